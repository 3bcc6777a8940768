"""Named by fuzzed configs that nobody has allowed to import code; the fuzzer looks whether this was imported."""


class Canary:
    pass
