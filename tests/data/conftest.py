import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # miniatures.py, which tests of other folders use too
