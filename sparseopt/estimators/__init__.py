"""Regressors and classifiers of scikit-learn, names of `sparseopt` that are loaded on first use.

`graph` fits signals on graphs, and `regression` fits sparse linear models.
"""

try:
    from sklearn.utils.validation import validate_data  # noqa: F401  since 1.6
except ImportError as error:
    raise ImportError(
        "the estimators need scikit-learn 1.6 or newer: pip install 'sparseopt[sklearn]'", name=error.name
    ) from error
