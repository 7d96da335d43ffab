import sys

from fate_moe.cli import main

sys.exit(main())
