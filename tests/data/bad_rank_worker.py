"""Trains in two processes that talk through gloo, on data that are too bad in the share of one of them.

Usage: bad_rank_worker.py FOLDER, which holds the shards `set` and takes what each rank ends with.
"""

import json
import sys
import warnings
from pathlib import Path

from pytorch_lightning.strategies import DDPStrategy
from test_datamodule import Recorder, make_data, make_trainer

from ldm.data import BadDataError
from ldm.training.fit import leave_group


def main() -> None:
    warnings.simplefilter("ignore")
    folder, model, told = Path(sys.argv[1]), Recorder(), ""
    trainer = make_trainer(strategy=DDPStrategy(process_group_backend="gloo"), devices=2, max_steps=150)
    try:
        trainer.fit(model, datamodule=make_data(folder / "set", run_folder=folder))
    except BadDataError as error:
        told = str(error)
    result = {"steps": len(model.seen), "told": told}
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(result))
    leave_group()


if __name__ == "__main__":
    main()
