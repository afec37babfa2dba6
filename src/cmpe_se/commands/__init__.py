"""The commands: `cmpe-se NAME` is the function NAME of ``cmpe_se.commands.NAME``."""
