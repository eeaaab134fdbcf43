"""The command lines: ``clipfs`` and the helpers of mount(8)."""
