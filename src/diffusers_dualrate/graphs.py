"""Network calls as CUDA graphs: recorded once for each shape, then replayed over buffers that stay where they are.

On a GPU a small network takes longer to launch, kernel by kernel, than to compute. A graph launches all kernels at once,
with the shapes, addresses and decisions of the call that was recorded. So shapes are its key, weights and modules are
compared before each chain, what goes in is copied into buffers, and what comes out is copied out of them.

Recorded are the two networks, not the steps between them. Steps have what a graph cannot hold: a generator for each image,
the state of any scheduler, the strength of guidance, and what a callback changes.
"""

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .network import UViTNetwork

# Shapes that are kept at once: those of a guided chain, in parts unguided, are four.
_MOST_RECORDINGS = 16

Function = Callable[..., tuple[Tensor, ...]]
"""Networks as a recording takes them: tensors to tensors, the rest decided by their shapes."""


def call_directly(function: Function, *arguments: Any) -> tuple[Tensor, ...]:
    """Call a function as it is: what stands in place of a recording where there is none."""
    return function(*arguments)


class Recording(NamedTuple):
    """A call over buffers that stay.

    Attributes:
        inputs: What a replay reads.
        outputs: What a replay writes.
        replay: Computes the outputs from the inputs.
    """

    inputs: list[Any]
    outputs: tuple[Tensor, ...]
    replay: Callable[[], None]

    def __call__(self, leaves: list[Any]) -> tuple[Tensor, ...]:
        for buffer, leaf in zip(self.inputs, leaves, strict=True):
            if isinstance(leaf, Tensor):
                buffer.copy_(leaf)
        self.replay()
        return tuple(output.clone() for output in self.outputs)


def record_cuda_graph(
    call: Callable[[], tuple[Tensor, ...]], device: torch.device
) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
    """Capture a call on a device as a CUDA graph: its outputs, and how to compute them anew."""
    with torch.cuda.device(device):  # else the launches on another than the current one would not be captured
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries and compilers settle on their kernels first
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the device
            outputs = call()
    return outputs, graph.replay


class Recordings:
    """The recorded calls of one pipeline's networks. One chain at a time has the use of them.

    Args:
        record: From a call and its device to its outputs and its replay.
        device_type: Where the networks must be.

    Attributes:
        num_replays: How many evaluations of a network were replays so far.
    """

    def __init__(self, record: Callable = record_cuda_graph, device_type: str = "cuda"):
        self._record, self._device_type = record, device_type
        self._kept: dict[Any, Recording] = {}  # the one that was used last stands last
        self._state: Any = None
        self._lock, self._told = threading.Lock(), set[str]()
        self._failure: str | None = None
        self.num_replays = 0

    def __deepcopy__(self, memo: dict) -> "Recordings":
        return type(self)(self._record, self._device_type)  # a copy has other weights

    @contextlib.contextmanager
    def lend(self, *networks: nn.Module | None, watch: bool = False) -> Iterator[Callable]:
        """While the block runs, hand out what calls a function by its recording, or directly where that might be wrong.

        Args:
            networks: All that the functions call.
            watch: Whether the networks may change on the way.
        """
        present = [network for network in networks if network is not None]

        def run_watched(function: Function, *arguments: Any) -> tuple[Tensor, ...]:
            return (self._run if self._allows(present) else call_directly)(function, *arguments)

        if not self._lock.acquire(blocking=False):
            yield call_directly  # another chain is on the way in these buffers
            return
        try:
            allowed = self._allows(present)
            yield run_watched if watch else self._run if allowed else call_directly
        finally:
            self._lock.release()

    def _allows(self, networks: list[nn.Module]) -> bool:
        """Whether these networks can be replayed as they are now; what no longer fits them is forgotten."""
        obstacle = self._failure or find_obstacle(networks, self._device_type)
        if obstacle is not None:
            if obstacle not in self._told:
                warnings.warn(f"CUDA graphs are off, and calls run without them: {obstacle}.", stacklevel=2)
            self._told.add(obstacle)
            return False
        state = [describe(network) for network in networks]
        if state != self._state:
            self._kept.clear()
            self._state = state
        return True

    def _run(self, function: Function, *arguments: Any) -> tuple[Tensor, ...]:
        if self._failure is not None:
            return function(*arguments)
        leaves, structure = tree_flatten(arguments)
        device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        # Two streams must not meet in one buffer, one of inference mode is not written outside it, and the user may
        # change how float32 is multiplied.
        settings = (
            _find_stream(device),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_inference_mode_enabled(),
        )
        key = (function.__name__, str(structure), tuple(_describe_leaf(leaf) for leaf in leaves), settings)
        recording = self._kept.pop(key, None)
        if recording is None:
            recording = self._make_recording(function, leaves, structure, device)
        if recording is None:
            return function(*arguments)
        self._kept[key] = recording
        if len(self._kept) > _MOST_RECORDINGS:
            del self._kept[next(iter(self._kept))]
        self.num_replays += 1
        return recording(leaves)

    def _make_recording(
        self, function: Function, leaves: list[Any], structure: Any, device: torch.device
    ) -> Recording | None:
        """Record a call at these shapes; `None` if the device does not allow it."""
        inputs = [torch.empty_like(leaf).copy_(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        arguments = tree_unflatten(inputs, structure)
        try:
            return Recording(inputs, *self._record(lambda: function(*arguments), device))
        except RuntimeError as error:  # also of too little memory
            self._kept.clear()
            why = str(error).splitlines()[0]
            self._failure = f"a call could not be recorded ({why}); enable_cuda_graphs() again tries anew"
            warnings.warn(f"CUDA graphs are off, and calls run without them: {self._failure}.", stacklevel=2)
            self._told.add(self._failure)
            return None


class GraphsMixin:
    """What a pipeline offers to run its networks as CUDA graphs."""

    _recordings: Recordings | None = None

    def enable_cuda_graphs(self) -> None:
        """Replay both networks as CUDA graphs, recorded at the first call of each shape: for GPUs that launches hold up.

        Images stay the same. Where a graph might be wrong (hooks of an offload or a cache, adapters, autocast, networks of
        diffusers, another device), a warning says so and the networks run without. `compile` works beside it, but for its
        mode "reduce-overhead". Buffers of each shape stay on the device until `disable_cuda_graphs`.
        """
        self._recordings = Recordings()

    @property
    def cuda_graphs(self) -> Recordings | None:
        """The recordings of `enable_cuda_graphs`, which count their replays; `None` without."""
        return self._recordings

    def disable_cuda_graphs(self) -> None:
        """Run the networks kernel by kernel again, and free what graphs hold."""
        self._recordings = None


def lend(recordings: Recordings | None, *networks: nn.Module | None, watch: bool = False):
    """What a chain of these networks calls functions by: recordings, where the pipeline has any."""
    if recordings is None:
        return contextlib.nullcontext(call_directly)
    return recordings.lend(*networks, watch=watch)


def _find_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _describe_leaf(leaf: Any) -> Any:
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def find_obstacle(networks: list[nn.Module], device_type: str) -> str | None:
    """Why calls of these networks cannot be replayed; `None` if they can."""
    if torch.is_autocast_enabled(device_type):
        return "autocast keeps weights that a graph cannot see"
    for network in networks:
        compiled = getattr(network, "_orig_mod", None)
        if compiled is not None:
            return f"{type(compiled).__name__} is wrapped by torch.compile: call its compile() instead"
        name = type(network).__name__
        if not isinstance(network, UViTNetwork):
            return f"{name} is a network of diffusers, which may wait for its device"
        if network.device.type != device_type:
            return f"{name} is on {network.device}, and they need {device_type}"
        if network.training:
            return f"{name} is in training mode"
        if getattr(network, "_hf_peft_config_loaded", False):
            return f"{name} has adapters, whose strength may change: fuse them into the weights, then unload them"
        if any(type(weight.data) is not Tensor for weight in network.parameters()):
            return f"{name} has quantised weights, whose addresses nobody tells"
        if len({weight.device for weight in network.parameters()}) > 1:
            return f"{name} is on several devices"
        for module in network.modules():
            replaced = "forward" in vars(module) or hasattr(module, "_hf_hook")
            if replaced or module._forward_hooks or module._forward_pre_hooks:
                return f"{name} has a hook (of an offload, a cache or a user's own), which no graph would call"
    return None


def describe(network: nn.Module) -> tuple:
    """What a graph of this network has fixed beside shapes: where weights lie, and how its modules compute."""
    tensors = [
        (tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in (*network.parameters(), *network.buffers())
    ]
    modules = []
    for module in network.modules():
        processor = getattr(module, "processor", None)
        chosen = {} if processor is None else vars(processor)  # such as the backend of attention
        chosen = {name: value if isinstance(value, str) else id(value) for name, value in chosen.items()}
        modules.append((id(module), id(module._compiled_call_impl), type(processor), chosen))
    return weakref.ref(network), tensors, modules
