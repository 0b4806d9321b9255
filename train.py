"""The same as `ldm train`."""

import sys

from ldm.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
