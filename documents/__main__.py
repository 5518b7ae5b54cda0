"""`python -m documents`: writes the pages that are made of the code, the pictures, and the site."""

from __future__ import annotations

import argparse
import sys

__all__ = ["main"]


def main() -> int:
    """Does what was asked for; returns 1 where the site has faults."""
    parser = argparse.ArgumentParser(prog="python -m documents", description=__doc__)
    parser.add_argument("what", choices=("reference", "pictures", "site"))
    chosen = parser.parse_args().what
    if chosen == "reference":
        from documents import chart, llms
        from documents.reference import write

        for name in write():
            print(f"docs/reference/{name}")
        llms.FILE.write_text(llms.made())
        chart.FILE.write_text(chart.made())
        chart.SCHEMA.write_text(chart.schema())
        return 0
    if chosen == "pictures":
        from documents.pictures import draw

        for name in draw():
            print(f"docs/{name}")
        return 0
    from documents.site import SITE, build

    faults = build()
    for fault in faults:
        print(fault, file=sys.stderr)
    if not faults:
        print(f"the site is in {SITE}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
