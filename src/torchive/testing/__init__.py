"""The conformance suite: what every module of a kind must hold, for the archive's methods and for yours.

    import torchive.testing

    torchive.testing.check(MyBlock, kind="block", inputs=[(2, 8, 9, 13)])
    torchive.testing.check(MyLoss, kind="loss", inputs=[(8, 16)], target={"kind": "classes", "num_classes": 4})
    report = torchive.testing.check(MyBlock, inputs=[(2, 8, 9, 13)], raises=False)
    print(report.table())

``check_method("gcnet")`` does it for a built method, from the table ``[tiny]`` of its card. The same keys are further
arguments of ``check``:

- ``args``: constructor keywords; a table ``{class_path, init_args}`` becomes that object.
- ``inputs``: shapes of ``forward``'s inputs, batch first, the main one first. A detector has ``images`` instead, a
  list of (C, H, W); a procedure ``image``, ``batch`` and ``views``.
- ``target``: ``kind`` is ``classes`` (``num_classes``; ``shape`` beyond the batch; ``open = true`` where any number of
  classes may occur, as with pair labels), ``masks`` (``num_classes``, ``ignore_index``), ``boxes`` (``num_classes``,
  ``masks``, ``landmarks``, a count for each class, ``pairs``), ``values`` (``shape``) or ``none``.
- ``smallest``: the smallest legal shape; ``too_small``: one that a ValueError refuses; ``divisor``: what H and W must
  be multiples of; ``fixed``: axes that may not vary; ``channel_axis``: 1, or -1 for tokens; ``any_channels``: the class
  does not fix the number of channels; ``same_shape``: a block's output has its input's shape (assumed of inserted
  blocks); ``border``: cells that unpadded layers take off a backbone's maps.
- ``values``: ``normal`` or ``uniform`` in [0, 1); ``scale``: a factor on the drawn inputs.
- ``may_be_negative``; ``mean_over = "valid"``: a loss whose mean is over the entries that count.
- ``model``: the network that an explanation explains, ``torchive.testing.models:SmallNetwork`` by default.
- ``learn``: ``lr``, ``steps`` and ``ratio`` of the learning check; ``dynamic`` and ``export_inputs``: how a detector
  exports.

``PretendedDevice`` is a context in which a GPU is there for Python code, on a machine without one; the check
``other_device`` uses it, and so can your own test.

An exemption (check -> reason) is run, and fails the suite when it is no longer needed. All numbers are drawn on the CPU
from fixed seeds; tolerances stand in one table by type, ``torchive.testing.tree.TOLERANCES``.
"""

from torchive.testing.checks import CHECKS, Check, checks_of
from torchive.testing.pretend import PretendedDevice
from torchive.testing.report import ConformanceError, NotApplicableError, Report, Row
from torchive.testing.running import built_methods, check, check_method, run, run_one, subject_of
from torchive.testing.subject import Subject

__all__ = [
    "CHECKS",
    "Check",
    "ConformanceError",
    "NotApplicableError",
    "PretendedDevice",
    "Report",
    "Row",
    "Subject",
    "built_methods",
    "check",
    "check_method",
    "checks_of",
    "run",
    "run_one",
    "subject_of",
]
