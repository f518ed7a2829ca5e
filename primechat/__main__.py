"""`python -m primechat` is the command `primechat`."""

import sys

from primechat.cli import main

sys.exit(main())
