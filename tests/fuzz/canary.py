"""Named by fuzzed configs that may not import code; the fuzzer checks that this was not imported."""


class Canary:
    pass
