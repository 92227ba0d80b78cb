"""How many tests were skipped and why, from the JUnit files that pytest wrote: `python tools/skipped.py FILE …`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree


def skipped(files: Sequence[Path]) -> tuple[int, Counter[str]]:
    """The number of tests in all files, and how many were skipped for each reason."""
    cases = [case for file in files for case in ElementTree.parse(file).iter("testcase")]
    reasons = (mark.get("message") or "no reason given" for case in cases for mark in case.iter("skipped"))
    return len(cases), Counter(reasons)


def main() -> int:
    """One line for each reason."""
    total, reasons = skipped([Path(name) for name in sys.argv[1:]])
    print(f"== {sum(reasons.values())} of {total} tests were skipped")
    for reason, count in reasons.most_common():
        print(f"   {count}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
