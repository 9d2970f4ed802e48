"""``python -m torchive.testing NAME... [--record] [--only CHECK...]``: the suite on built methods, as a table."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from torchive.catalogue import record_evidence
from torchive.testing.checks import names
from torchive.testing.running import built_methods, check_method


def main(arguments: list[str] | None = None) -> int:
    """Run the suite on the methods named, or on all built ones; exit status 1 where a check failed."""
    parser = argparse.ArgumentParser(
        prog="python -m torchive.testing", description="Run the conformance suite on built methods."
    )
    parser.add_argument("methods", nargs="*", metavar="NAME", help="methods; all built ones if none is named")
    parser.add_argument(
        "--only", action="append", choices=names(), metavar="CHECK", help="run this check; may be repeated"
    )
    parser.add_argument("--record", action="store_true", help="write the evidence step `built` of methods that pass")
    options = parser.parse_args(arguments)
    if options.record and options.only:
        parser.error("--record needs the whole suite, so it does not go with --only")
    failed = 0
    for name in options.methods or built_methods():
        try:
            report = check_method(name, only=options.only, raises=False)
        except (KeyError, ValueError) as error:
            print(f"torchive: {error.args[0]}", file=sys.stderr)
            return 2
        print(report.table())
        failed += len(report.failed)
        if options.record and not report.failed:
            counts: dict[str, Any] = {key.replace(" ", "_"): n for key, n in report.counts().items() if key != "failed"}
            exempt = {row.check: row.reason for row in report.rows if row.outcome == "exempt"}
            command = f"python -m torchive.testing {report.name} --record"
            seconds = round(report.seconds, 1)
            record_evidence(report.name, "built", command, exemptions=exempt, seconds=seconds, **counts)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
