"""`python -m primechat` is the command `primechat`."""

import sys

from primechat.cli.main import main

sys.exit(main())
