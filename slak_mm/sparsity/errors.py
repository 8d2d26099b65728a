"""What goes wrong with sparsity, in a sentence."""


class SparsityError(ValueError):
    """An option, a state or a set of weights does not fit."""


class DenseWeights(SparsityError):
    """Masks were to be made from the zeros of weights that have none."""


class FrozenWeights(SparsityError):
    """None of the weights that were selected is trained."""
