"""The one place that touches private tables of diffusers.

`DiffusionPipeline.download` refuses a repository whose components come from a library that is not a key of
`LOADABLE_CLASSES`, and reads from that entry which base class loads and saves them. One entry makes repositories of
ours load from the Hub with no trust flag and no code of the repository run. The attribute on `diffusers.pipelines`
lets the generic loader resolve the same names for people who load through `custom_pipeline`.
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
