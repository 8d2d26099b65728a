"""Pictures and figures about models and their results."""

from .overlay import class_shares, colorize, overlay, panel, with_legend

__all__ = ['class_shares', 'colorize', 'overlay', 'panel', 'with_legend']
