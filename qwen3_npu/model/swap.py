"""--swap-attention: keep activations of a layer in host memory, and copy them back before its backward.

Copies run on two separate streams. The activations of a layer are copied to the host while the next layer computes, and
are freed on the device after that layer. They are copied back during the backward of the next layer. Those of the last
layer stay on the device. The host never waits.

MindSpeed's feature of the same name does this for the attention of megatron-core's layers, by the same flags.
"""

from __future__ import annotations

import collections
import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
from megatron.core.models.gpt import GPTModel

from qwen3_npu.args.rules.swapping import Swapping
from qwen3_npu.host_memory import host_tensor


class _Traffic:
    """Streams and host memory of all layers of a process.

    Attributes:
        leaving: the pass that was computed last; its copy runs, and it is still on the device.
    """

    def __init__(self) -> None:
        self.leaving: LayerPass | None = None
        self._streams: list[torch.cuda.Stream | None] | None = None
        self._free: dict[tuple[int, torch.dtype], list[torch.Tensor]] = collections.defaultdict(list)

    def stream(self, device: torch.device, number: int) -> torch.cuda.Stream | None:
        """The stream of copies to the host (0) or to the device (1); None if the device has no streams."""
        if self._streams is None:
            self._streams = [None if device.type == "cpu" else torch.cuda.Stream() for _ in range(2)]
        return self._streams[number]

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """Host memory for a copy. No earlier copy still reads it: the `out` stream waits for one that waited for it."""
        free = self._free[like.numel(), like.dtype]
        return free.pop() if free else host_tensor(like.shape, like.dtype, pinned=like.device.type != "cpu")

    def give_back(self, memory: torch.Tensor) -> None:
        self._free[memory.numel(), memory.dtype].append(memory)


class _Kept:
    """One storage that backward needs.

    Attributes:
        owner: the storage, while another object holds it.
        here: the whole storage as a flat tensor, while it is on the device.
        in_place: the storage is emptied and filled again; else a new storage replaces it.
        memory: its copy on the host.
        uses: number of saved tensors that backward has not used yet.
    """

    def __init__(self, tensor: torch.Tensor, storage: torch.UntypedStorage, in_place: bool) -> None:
        self.owner = weakref.ref(storage)
        # `data`, not `detach`: with `detach` autograd would object when the copy back writes to it.
        flat = tensor.data.as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0)
        self.here: torch.Tensor | None = flat
        self.in_place, self.flat = in_place, flat if in_place else None
        self.memory: torch.Tensor | None = None
        self.uses = 0

    def let_go(self) -> None:
        """Free the device's memory."""
        self.here = None
        if self.flat is not None:
            self.flat.untyped_storage().resize_(0)

    def make_room(self, device: torch.device) -> bool:
        """Allocate memory on the device. Returns whether the copy must be copied there."""
        assert self.memory is not None
        if self.flat is not None:
            self.flat.untyped_storage().resize_(self.memory.nbytes)
            self.here = self.flat
            return True
        storage = self.owner()
        if storage is not None:  # something else still holds it
            self.here = torch.empty(0, dtype=self.memory.dtype, device=device).set_(storage, 0, self.memory.shape, (1,))
            return False
        self.here = torch.empty(self.memory.shape, dtype=self.memory.dtype, device=device)
        return True


class LayerPass:
    """The swapped activations of one layer and one micro-batch."""

    def __init__(self, traffic: _Traffic, before: LayerPass | None, weights: Iterable[torch.Tensor]) -> None:
        """
        Args:
            before: the pass of the layer before, of the same micro-batch.
            weights: of the layer; they stay where they are.
        """
        self.traffic, self.before = traffic, before
        self.staying = {weight.untyped_storage()._cdata for weight in weights}
        self.kept: dict[int, _Kept] = {}
        self.shared: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.is_away = False
        self.arrived: torch.cuda.Event | None = None  # event, until it was waited for
        self.departed: torch.cuda.Event | None = None
        self.device = torch.device("cpu")

    def __del__(self) -> None:
        for kept in self.kept.values():
            self._done(kept)

    def _done(self, kept: _Kept) -> None:
        """Backward has used it. Objects that refer to it may live longer."""
        if kept.memory is not None:
            self.traffic.give_back(kept.memory)
        kept.here = kept.flat = kept.memory = None

    def add(self, tensor: torch.Tensor, in_place: bool = False) -> _Kept | None:
        """Swap the storage of this tensor; None if it must stay."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self.kept.get(key)
        if known is not None and known.owner() is storage:
            known.in_place |= in_place
            if in_place and known.flat is None:
                known.flat = known.here
            return known if known.here is not None and known.here.dtype == tensor.dtype else None
        is_whole = storage.nbytes() % max(tensor.itemsize, 1) == 0 and storage.nbytes() > 0
        if not (tensor.is_floating_point() and is_whole) or key in self.staying or self._is_shared(key, storage):
            return None
        if tensor.dim() == 0 or (self.kept and tensor.device != self.device):
            return None
        self.device = tensor.device
        kept = self.kept[key] = _Kept(tensor, storage, in_place)
        return kept

    def _is_shared(self, key: int, storage: torch.UntypedStorage) -> bool:
        """Whether the previous layer keeps it, too, e.g. rotary angles, which all layers read."""
        if self.before is None:
            return False
        known = self.before.kept.get(key)
        owner = known.owner if known is not None else self.before.shared.get(key)
        if owner is None or owner() is not storage:
            return False
        self.shared[key] = owner
        return True

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """What autograd saves inside is swapped."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield
        self.copy_out()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | tuple:
        kept = self.add(tensor)
        if kept is None:
            return tensor
        kept.uses += 1
        return self, kept, tensor.shape, tensor.stride(), tensor.storage_offset()

    @staticmethod
    def _unpack(saved: torch.Tensor | tuple) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        owner, kept, *place = saved
        owner.arrive()
        assert kept.here is not None, "swapped activations are requested twice"
        view: torch.Tensor = kept.here.as_strided(*place)
        kept.uses -= 1
        if kept.uses == 0:
            owner._done(kept)
        return view

    def copy_out(self) -> None:
        """Start copies to the host of newly added storages."""
        new = [kept for kept in self.kept.values() if kept.memory is None]
        if not new:
            return
        stream = self.traffic.stream(self.device, 0)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            for kept in new:
                assert kept.here is not None
                kept.memory = self.traffic.take(kept.here)
                kept.memory.copy_(kept.here, non_blocking=True)
        self.departed = None if stream is None else stream.record_event()

    def end(self) -> None:
        """The layer is computed: free the previous pass on the device; this one is next."""
        self.copy_out()
        gone, self.traffic.leaving = self.traffic.leaving, self
        if gone is None or gone.is_away:
            return
        if gone.departed is not None:  # from here on the device may use the memory for something else
            torch.cuda.current_stream().wait_event(gone.departed)
        for kept in gone.kept.values():
            kept.let_go()
        gone.is_away = True

    def fetch(self) -> None:
        """Start copies to the device of storages that are not there."""
        if self.traffic.leaving is self:
            self.traffic.leaving = None
            if self.departed is not None:  # backward gives the memory back, which the copy still reads
                torch.cuda.current_stream().wait_event(self.departed)
        if not self.is_away:
            return
        self.is_away = False
        wanted = [kept for kept in self.kept.values() if kept.make_room(self.device)]
        stream = self.traffic.stream(self.device, 1)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            for kept in wanted:
                assert kept.here is not None
                assert kept.memory is not None
                kept.here.copy_(kept.memory, non_blocking=True)
        self.arrived = None if stream is None else stream.record_event()

    def arrive(self) -> None:
        """Backward needs this pass now; fetch the previous layer's, too."""
        self.fetch()
        if self.arrived is not None:
            torch.cuda.current_stream().wait_event(self.arrived)
            self.arrived = None
        for kept in self.kept.values():
            if kept.in_place and kept.uses == 0:
                self._done(kept)
        if self.before is not None:
            self.before.fetch()
            self.before = None


class LayerSwap:
    """The passes of one layer.

    Attributes:
        now: the pass that is being computed.
    """

    def __init__(self, traffic: _Traffic, layer: torch.nn.Module, earlier: LayerSwap | None) -> None:
        """Args: earlier: of the layer before, in the same model chunk."""
        self.traffic, self.earlier = traffic, earlier
        self.weights = [weakref.ref(weight) for weight in layer.parameters()]
        self.now: LayerPass | None = None
        self.last: weakref.ref[LayerPass] | None = None

    def begin(self) -> None:
        before = self.earlier.last() if self.earlier is not None and self.earlier.last is not None else None
        weights = [weight for ref in self.weights if (weight := ref()) is not None]
        self.now = LayerPass(self.traffic, before, weights)
        self.last = weakref.ref(self.now)

    def end(self, out: torch.Tensor) -> None:
        """End the pass. Copies back start when the gradient of `out`, the layer's output, arrives."""
        assert self.now is not None
        ended, self.now = self.now, None
        ended.end()
        if out.requires_grad:
            out.register_hook(lambda _: ended.fetch())
        else:
            self.traffic.leaving = None  # no storage was kept


def saving(swap: LayerSwap | None) -> contextlib.AbstractContextManager[None]:
    """What autograd saves inside is swapped, in a pass that is being computed."""
    return contextlib.nullcontext() if swap is None or swap.now is None else swap.now.saving()


def kept_in_place(swap: LayerSwap | None, x: torch.Tensor, linear: torch.nn.Module) -> None:
    """Swap the input of a linear with trained weights. Only the linear may read it from here on.

    megatron's linears find their weights by the identity of saved tensors, which hooks would replace. So the input's
    storage is emptied and filled again in place.
    """
    if swap is not None and swap.now is not None and any(weight.requires_grad for weight in linear.parameters()):
        swap.now.add(x, in_place=True)


def arriving(swap: LayerSwap | None, out: torch.Tensor) -> None:
    """Fetch the activations of the module that computed `out` when the gradient of `out` arrives."""
    if swap is not None and swap.now is not None and out.requires_grad:
        began = swap.now
        out.register_hook(lambda _: began.arrive())


def swap_activations(chunks: Sequence[GPTModel], wanted: Swapping) -> None:
    """Let layers swap activations of the chosen modules, and recompute the MLPs of the chosen layers."""
    traffic = _Traffic()
    for chunk in chunks:
        earlier: LayerSwap | None = None
        found = [layer for layer in chunk.decoder.layers if hasattr(layer, "swap")]
        for layer in found[: wanted.recomputed]:
            layer.recompute_mlp = True
        for layer in found[: wanted.layers]:
            layer.swap = earlier = LayerSwap(traffic, layer, earlier)
            for name in wanted.modules:
                getattr(layer, name).swap = layer.swap
