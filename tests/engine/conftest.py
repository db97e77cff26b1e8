"""Worker processes import the functions they run by module name: this folder's program must have one."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
