"""What was tried with the package, and what it showed: run as modules from the repository root, `python -m research.study ...`.

The study calls the training scripts that a user calls, so `examples/` is put on the path here, and nowhere else.
"""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))
