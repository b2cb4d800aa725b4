"""The one place that touches private tables of diffusers.

`DiffusionPipeline.download` refuses components from a library that is no key of `LOADABLE_CLASSES`. The entry names the
base classes that load and save them. With it our repositories load from the Hub without a trust flag, and none of their
code is run. The attribute on `diffusers.pipelines` serves people who load through `custom_pipeline`.
"""

import sys

_SUPPORTED = "diffusers >= 0.40"


def register(package: str) -> None:
    """Make components recorded as `[package, class]` in a model_index.json loadable. Calling it again changes nothing.

    Args:
        package: Name of the imported package that re-exports `ModelMixin` and `SchedulerMixin`.

    Raises:
        ImportError: If this version of diffusers keeps its tables elsewhere.
    """
    try:
        import diffusers.pipelines as pipelines
        from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
    except ImportError as error:
        raise ImportError(
            f"{package} cannot register its components with this version of diffusers; it needs {_SUPPORTED}."
        ) from error
    methods = ["save_pretrained", "from_pretrained"]
    LOADABLE_CLASSES.setdefault(package, {"ModelMixin": methods, "SchedulerMixin": methods})
    if not hasattr(pipelines, package):
        setattr(pipelines, package, sys.modules[package])
