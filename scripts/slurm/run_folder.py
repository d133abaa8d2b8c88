"""Prints the run folder that train.py will use for these overrides: `run_folder.py [key=value ...]`.

For scripts, which look there for checkpoints: in a second, since it composes without torch. What does not compose is refused
by train.py, in better words.
"""

import sys
from pathlib import Path

from hydra import compose, initialize_config_dir

with initialize_config_dir(str(Path(__file__).resolve().parents[2] / "conf"), version_base="1.3"):
    run = compose("train", sys.argv[1:])
    print(Path(run.runs_dir) / str(run.name))
