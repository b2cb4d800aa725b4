"""Call a training script of examples/ on the letters, with its own flags.

    python -m research.train train_dual_rate --preset research/presets/letters16.json --dataset_name letters \\
        --label_column label --output_dir runs/dualrate-letters

The scripts are `train_dual_rate`, `train_single_rate`, `distill`, `train_classifier` and `evaluate`. Each is given
`letters.open_images`, and does what it does otherwise: so one trains on any data set of torch.
"""

import sys

import distill
import evaluate
import train_classifier
import train_dual_rate
import train_single_rate
from diffusers_dualrate.processes import run_script

from .letters import open_images

SCRIPTS = {
    module.__name__: module for module in (train_dual_rate, train_single_rate, distill, train_classifier, evaluate)
}


def main(argv: list[str]):
    """Run a script, named first, with its flags.

    Raises:
        ValueError: If there is no such script.
    """
    if not argv or argv[0] not in SCRIPTS:
        raise ValueError(
            f"The first argument must be one of {', '.join(SCRIPTS)}, got {' '.join(argv[:1]) or 'none'}."
        )
    script = SCRIPTS[argv[0]]
    return script.main(script.parse_args(argv[1:]), open_images)


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
