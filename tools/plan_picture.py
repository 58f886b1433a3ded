"""Draw the picture in README.md: ``python tools/plan_picture.py [FILE]`` (default: tools/pictures/plan.svg).

It shows what ``plan --svg`` draws: four ranks at TP2 x PP2 saved a model like Mistral 7B, four ranks at TP4 load it.
The data of the checkpoint are holes in its files, so it takes no space; the plan reads only the metadata. Needs
``pip install -e '.[demo]'``.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

sys.path.append(str(Path(__file__).with_name("bench")))

from models import config_of_size, make_sparse_checkpoint

import dist_ckpt_mistral as dcm
from dist_ckpt_mistral.analysis.picture import picture

FILE: Final = Path(__file__).absolute().parent / "pictures" / "plan.svg"
_BYTES: Final = 14_500_000_000
_SAVED_AT: Final = dcm.ParallelLayout(tp=2, pp=2)
_LOADED_AT: Final = dcm.ParallelLayout(tp=4)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the picture into the file that the first argument names."""
    given = sys.argv[1:] if arguments is None else arguments
    file = Path(given[0]).absolute() if given else FILE
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # so that the picture names no such folder
        checkpoint = Path("ckpt", "iter_0000500")
        make_sparse_checkpoint(
            checkpoint, config_of_size(_BYTES), _SAVED_AT, style=dcm.KeyStyle.STACKED, with_optimizer=False
        )
        picture.save_picture(dcm.plan_reading(checkpoint, _LOADED_AT), file)


if __name__ == "__main__":
    main()
