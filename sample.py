"""The same as `ldm sample`."""

import sys

from ldm.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["sample", *sys.argv[1:]]))
