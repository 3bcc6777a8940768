"""Collected by `-m accelerators` alone: to import these files tells JAX to make eight devices of the host."""


def pytest_ignore_collect(collection_path, config):
    return True if config.option.markexpr != "accelerators" else None
