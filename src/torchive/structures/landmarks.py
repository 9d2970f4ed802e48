"""Landmarks of several classes in one row of channels, of which each class owns a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LandmarkSpace:
    """K classes with ``counts[k]`` landmarks each, one class after the other in a row of P.

    ``names`` are the classes, and ``sigmas`` (P,) how far each landmark is off, over the root of the object's area,
    where different people mark it; either may be empty.

    Raises:
        ValueError: a negative count, no landmark at all, or names or sigmas that do not fit.
    """

    counts: tuple[int, ...]
    names: tuple[str, ...] = ()
    sigmas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not sum(self.counts) or min(self.counts) < 0:
            raise ValueError(f"expected counts of landmarks, none negative and one above zero, got {self.counts}")
        if self.names and len(self.names) != len(self.counts):
            raise ValueError(f"expected {len(self.counts)} names, got {len(self.names)}")
        if self.sigmas and (len(self.sigmas) != self.total or min(self.sigmas) <= 0):
            raise ValueError(f"expected {self.total} sigmas above zero, got {len(self.sigmas)}")

    @property
    def total(self) -> int:
        """P, the landmarks of all classes."""
        return sum(self.counts)

    @property
    def largest(self) -> int:
        """The most landmarks that a class has."""
        return max(self.counts)

    def span(self, label: int) -> slice:
        """Where the landmarks of a label, from 1 to K, stand in the row."""
        start = sum(self.counts[: label - 1])
        return slice(start, start + self.counts[label - 1])


#: In ten thousandths, a line or two for each category.
_SIGMAS = """
120 158 169 165 169 158 298 329 321 323 340 388 452 574 492 352 492 574 452 388 340 323 321 329 298
194 170 185 193 185 170 286 471 547 526 430 392 513 566 509 564 542 604 599 520 599 604 542 564 509 566 513
392 430 526 547 471 286
74 85 165 248 165 85 156 231 296 137 195 250 347 380 257 370 257 380 347 250 195 137 296 231 156 248 469 632
370 469 632
137 153 243 377 243 153 203 366 467 433 393 329 418 477 399 331 420 492 436 478 436 492 420 331 399 477 418
329 393 433 467 366 203 377 645 573 478 645 573
352 158 210 214 210 158 196 500 489 404 401 404 489 500 196
276 548 283 204 283 548 369 726 677 640 251 640 677 726 369
308 216 308 506 494 463 477 463 494 506
275 202 275 651 451 350 280 392 362 392 280 350 451 651
253 195 253 513 543 415 543 513
153 230 167 145 167 230 332 391 391 396 440 452 498 514 585 655 635 602 635 655 585 514 498 452 440 396 391
391 332
121 134 158 162 158 134 246 406 470 404 463 466 435 499 455 440 411 490 576 685 618 483 618 685 576 490 411
440 486 499 435 466 463 404 470 406 246
116 167 160 180 160 167 196 385 421 497 562 528 428 528 562 497 421 385 196
244 297 244 208 244 297 173 616 659 712 707 685 339 685 707 712 659 616 173
"""

#: The 13 categories and 294 landmarks of DeepFashion2 (arXiv:1901.07973), with the sigmas of its evaluation.
DEEPFASHION2 = LandmarkSpace(
    counts=(25, 33, 31, 39, 15, 15, 10, 14, 8, 29, 37, 19, 19),
    names=(
        "short sleeve top",
        "long sleeve top",
        "short sleeve outwear",
        "long sleeve outwear",
        "vest",
        "sling",
        "shorts",
        "trousers",
        "skirt",
        "short sleeve dress",
        "long sleeve dress",
        "vest dress",
        "sling dress",
    ),
    sigmas=tuple(int(part) / 10000 for part in _SIGMAS.split()),
)
