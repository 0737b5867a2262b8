"""These tests need the extras `hf`, `wandb`, `trackio` and `pandas`, and are no part of `make test`: `make test-extras`
installs them and runs it all. Nothing is asked of a hub; and the folder where transformers keeps a model's code goes
with the session."""

import os
import tempfile

_home = tempfile.TemporaryDirectory(prefix="timebox-hf-")
os.environ |= {"HF_HOME": _home.name, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
os.environ["TOKENIZERS_PARALLELISM"] = "false"
