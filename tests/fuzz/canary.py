"""Named by random configs that may not import code; the test checks that this was not imported."""


class Canary:
    pass
