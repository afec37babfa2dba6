"""The commands: `cmpe-se NAME` is the function NAME of ``cmpe_se.commands.NAME``."""

from cmpe_se.utils.packages import require_train

require_train("cmpe_se.commands")
