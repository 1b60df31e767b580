"""The conditional layer: a router decides, a dispatcher moves tokens, experts compute.

Legend: G routing groups, N tokens of a group, F = G * N tokens, E experts, C capacity, K choices of a token, D width.
On one device G is 1; on a cluster G is the number of data shards, and the transpose [G, E, C, D] <-> [E, G * C, D] is
the only thing that crosses devices.
"""

from collections.abc import Callable

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.parallel import Layout

from switchyard.config import Config, MoEConfig
from switchyard.distributed.mesh import LOCAL, CompiledMesh, LocalMesh, first
from switchyard.moe.dispatch.dispatchers import Dispatcher, create_dispatcher
from switchyard.moe.experts import FeedForwardExperts
from switchyard.moe.metrics import width
from switchyard.moe.own_classes import require_cut_experts, require_joined
from switchyard.moe.own_experts import own_experts
from switchyard.moe.routing import create_router
from switchyard.moe.routing.base import find_router, make_context, require_choices, require_learnable
from switchyard.moe.routing.losses import AuxiliaryLosses
from switchyard.moe.routing.own_routers import require_sharded_router
from switchyard.moe.shared_experts import SharedExperts
from switchyard.moe.statistics import Statistics
from switchyard.nn.fused import NONE
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.masks import Hide, Selection
from switchyard.nn.noise import NoiseSlice, NoiseSlices, UniformRows


class MoELayer(nn.Cell):
    """Sends every token through the experts that its router chooses, and adds up what they make of it.

    A token without a slot comes back as zero, so that the residual carries it; padding too. Router, experts and shared
    experts see zeros in the place of padding, whose contents reach nothing: no output, no loss, no gradient.

    In training an expert has ceil(N * K * capacity_factor / E) slots of each group, or room for all (`moe.dispatch`).
    At evaluation `eval_capacity_factor` counts, and null, the default, drops nothing: a token's output does not depend
    on its batch.

    Args:
        config: the whole configuration.
        std: (first, last) initial standard deviation of the experts' matrices.
        random: hands out the initial weights.
        dtype: of the experts' matrix products.
        slices: hands out the slices of noise that jitter and the router read.
        vocab_size: of the tokens whose ids come along, for routers that choose by token.
        has_tasks: whether task ids come along, for routers that choose by task.
        make_experts: (experts E, hidden width) -> the experts' cell, [E, S, D] -> [E, S, D], where they are not
            feed-forward on D. It may have `blocks`, which spares work where nothing is dropped.
        fused: operators of the device, see nn.fused.
        mesh: the devices.
        place: which of the model's conditional layers this is, from 0.

    Returns:
        Tokens [F, D]; router statistics [G, 6 + 2 E], whose first three columns, the losses, carry gradients (see
        moe.metrics); choices of the router [F, K] int32 where moe.record asks for them, else ().

    Raises:
        UserError: an option that the router or the experts cannot serve.

    Examples:
        >>> from switchyard.config import build
        >>> config = build({"model": {"hidden_size": 8, "num_heads": 2}, "moe": {"expert_num": 4}})
        >>> layer = MoELayer(config, (0.02, 0.02), InitialWeights(0), mstype.float32, NoiseSlices())
        >>> tokens, valid, noise = ops.ones((6, 8)), ops.ones((1, 6)), ops.zeros((1, 1, 1))
        >>> out, stats, choices = layer(tokens, valid, noise)
        >>> out.shape, stats.shape, choices
        ((6, 8), (1, 14), ())
    """

    def __init__(
        self,
        config: Config,
        std: tuple[float, float],
        random: InitialWeights,
        dtype,
        slices: NoiseSlices,
        vocab_size: int | None = None,
        has_tasks: bool = False,
        make_experts: Callable[[int, int], nn.Cell] | None = None,
        fused: frozenset[str] = NONE,
        mesh: LocalMesh = LOCAL,
        place: int = 0,
    ):
        super().__init__()
        moe = config.moe
        self.config, self.place = config, place
        self.expert_num, self.choices, self.jitter = moe.expert_num, moe.choices, moe.jitter
        self.slice = NoiseSlice(slices, self.jitter > 0)
        self.priority = UniformRows(slices, config.model.hidden_size, 1) if moe.drop_order == "random" else None
        self.router = create_router(config, random, slices, vocab_size, has_tasks)
        self.decides_whole = self.router.overrides_construct
        self.state_num = 0 if self.decides_whole else len(self.router.state())
        self.takes_tokens = vocab_size is not None and "token_ids" in self.router.needs
        self.takes_tasks = has_tasks and "task_ids" in self.router.needs
        self.experts, self.shared = create_experts(config, std, random, dtype, make_experts, fused)
        self.hide, self.expand_dims, self.add = Hide(), ops.ExpandDims(), ops.Add()
        self.round_robin = RoundRobinRouting(moe) if moe.force_balance else None
        self.train_dispatcher = create_dispatcher(self.router, config, True, self.experts, fused, mesh)
        self.eval_dispatcher = create_dispatcher(self.router, config, False, self.experts, fused, mesh)
        self.records = moe.record is not None
        require_able(moe)
        self.auxiliary = AuxiliaryLosses(moe, self.router, config.model.seq_length // config.row_tokens)
        self.statistics = Statistics(moe.choices, self.router)
        self.local_hide, self.local_jitter = self.hide_padding, self.add_jitter
        self.local_train, self.local_eval = (self.send, self.send_forced), (self.send, self.send_forced)

    def construct(
        self,
        tokens: Tensor,
        valid: Tensor,
        noise: Tensor,
        token_ids: Tensor = None,
        task_ids: Tensor = None,
        replay: Tensor = None,
        view: Tensor = None,
    ):
        """Returns what the class says.

        Args:
            tokens: [F, D] or [G, N, D].
            valid: [G, N]; 1 = real, 0 = padding.
            noise: [.., F, D] of U(0, 1), read in training alone.
            token_ids, task_ids: [F] int32, where the router reads them.
            replay: [M, F, K] int32, forced choices of all M conditional layers, -1 where the router's own stand.
            view: [F, D], what the router sees where it is not the tokens, which may then be of any width.
        """
        tokens = self.local_hide(flat(tokens), valid)  # [F, D]
        inputs = self.router_inputs(tokens, valid, noise, token_ids, task_ids, view)
        # Functions are chosen, no branch holds what they return: the compiler of a cluster would lose its shapes
        send, send_forced = self.local_train if self.training else self.local_eval
        dispatcher = self.train_dispatcher if self.training else self.eval_dispatcher
        if replay is None:
            sent = send(tokens, valid, noise, *inputs)
        else:
            sent = send_forced(tokens, valid, noise, replay, *inputs)
        rest = len(sent) - 1 - self.records
        out = dispatcher.apply(self.experts, sent[:rest])
        if self.shared is not None:
            out = self.add(out, self.shared(self.expand_dims(tokens, 0)).reshape(out.shape))
        return out, sent[rest], sent[-1] if self.records else ()

    def router_inputs(self, tokens: Tensor, valid: Tensor, noise: Tensor, token_ids, task_ids, view) -> tuple:
        """Returns what the decision is made of: ids [F] where the router reads them, its state, its scores [F, X].

        The arguments are those of `construct`; padding is hidden in the tokens [F, D].
        """
        seen, ids = tokens if view is None else self.local_hide(flat(view), valid), ()
        if self.training and self.jitter > 0:
            seen = self.local_jitter(seen, noise)
        if self.takes_tokens:
            token_ids = flat_ids(token_ids)
            ids = (*ids, token_ids)
        if self.takes_tasks:
            task_ids = flat_ids(task_ids)
            ids = (*ids, task_ids)
        if self.decides_whole:
            return (*ids, seen)
        return (*ids, *self.router.state(), *self.router.scores(seen, token_ids, task_ids))

    # ---- from here to `shard` everything is local to one device and reads no Parameter
    def hide_padding(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """Returns tokens [F, D], zeros where valid [G, N] is 0."""
        return self.hide(tokens, valid.reshape(-1))

    def add_jitter(self, tokens: Tensor, noise: Tensor) -> Tensor:
        """Multiplies tokens [F, D] by factors near 1 (arXiv 2101.03961, appendix C)."""
        return tokens * (1.0 - self.jitter + 2.0 * self.jitter * self.slice(noise))

    def send(self, tokens: Tensor, valid: Tensor, noise: Tensor, *inputs, replay: Tensor = None) -> tuple:
        """Routes tokens [F, D], and fills what travels; replay [G, N, K] int32: choices that are forced.

        Returns:
            What the dispatcher sends..., statistics [G, 6 + 2 E], and with moe.record choices [F, K].
        """
        if self.round_robin is not None and replay is None:
            replay = self.round_robin(valid)
        routing, tokens = self.route(valid, noise, replay, inputs), tokens.reshape(*valid.shape, -1)  # [G, N, D]
        if self.training and self.priority is not None:
            routing["priority"] = self.priority(noise).reshape(valid.shape)  # [G, N]
        dispatcher = self.train_dispatcher if self.training else self.eval_dispatcher
        sent = dispatcher.send(tokens, routing)
        kept = dispatcher.num_kept(routing, sent)
        stats = self.statistics(routing, self.auxiliary(routing, valid), kept, valid)
        if self.records:
            return (*sent, stats, ops.stop_gradient(routing["expert_index"]).reshape(-1, self.choices))
        return (*sent, stats)

    def send_forced(self, tokens: Tensor, valid: Tensor, noise: Tensor, replay: Tensor, *inputs) -> tuple:
        """Does what `send` does with the choices of this layer in replay [M, F, K] int32."""
        own = replay[self.place].reshape(*valid.shape, -1)  # [G, N, K]
        return self.send(tokens, valid, noise, *inputs, replay=own)

    def route(self, valid: Tensor, noise: Tensor, replay: Tensor, inputs: tuple) -> dict:
        """Returns the router's decision in groups [G, N]; inputs: see `router_inputs`."""
        token_ids, task_ids = None, None
        if self.takes_tokens:
            token_ids, inputs = inputs[0].reshape(valid.shape), inputs[1:]  # [G, N]
        if self.takes_tasks:
            task_ids, inputs = inputs[0].reshape(valid.shape), inputs[1:]
        state, grouped = inputs[: self.state_num], ()
        for part in inputs[self.state_num :]:
            grouped = (*grouped, part.reshape(*valid.shape, -1))  # [G, N, X]
        context = make_context(valid, noise, token_ids, task_ids, state, replay)
        return self.router(grouped[0], context) if self.decides_whole else self.router.route(grouped, context)

    # ---- layouts
    def shard(self, mesh: CompiledMesh) -> None:
        """Declares the layouts: tokens and groups are sharded by data shards, experts by expert shards.

        Raises:
            UserError: a router or experts that cannot be sharded.
        """
        require_sharded_router(self.router, self.config.moe.router)
        self._require_shards()
        require_joined(self.experts, mesh.degrees)
        self.router.shard(mesh)
        for _, cell in self.cells_and_names():
            if isinstance(cell, Selection):
                cell.shard(mesh)
        if self.train_dispatcher.runs_experts or self.eval_dispatcher.runs_experts:
            self.experts.shard(mesh)
        else:
            self.experts.shard_matrices(mesh)
        if self.shared is not None:
            self.shared.shard(mesh)
            self.expand_dims.shard(((mesh.degrees.data_parallel, 1),))
            self.add.shard(((mesh.degrees.data_parallel, 1),) * 2)
        pair = mesh.layout("data", None)
        self.local_hide = mesh.local(self.hide_padding, (pair, pair), (pair,), first, first)
        if self.jitter > 0:
            self.local_jitter = mesh.local(self.add_jitter, (pair, mesh.noise), (pair,), first, first)
        self.local_train = self._sharded(mesh, self.train_dispatcher, mesh.noise)
        self.local_eval = self._sharded(mesh, self.eval_dispatcher, mesh.no_noise)

    def _require_shards(self) -> None:
        """Refuses experts of a user's own that cannot be sharded (UserError)."""
        moe, run = self.config.moe, self.train_dispatcher.runs_experts and self.eval_dispatcher.runs_experts
        require_cut_experts(self.experts, self.expert_num, None if run else moe.dispatch)
        if self.shared is not None:
            require_cut_experts(self.shared, 1)

    def _sharded(self, mesh: CompiledMesh, dispatcher: Dispatcher, noise: Layout) -> tuple[Callable, Callable]:
        """Returns `send` and `send_forced` of a dispatcher as operators of one device."""
        dispatcher.shard(mesh)
        pair, row, forced = mesh.layout("data", None), mesh.layout("data"), mesh.layout(None, "data", None)
        ids = (row,) * (self.takes_tokens + self.takes_tasks)
        state = tuple(mesh.layout(*(None,) * parameter.ndim) for parameter in self.router.state())
        inputs = (*ids, *state, *(pair,) * self.router.score_num)
        shapes, types = self._results(dispatcher, mesh.groups)
        outputs = tuple(mesh.layout("data", *(None,) * (len(shape) - 1)) for shape in shapes((mesh.groups, 1)))
        return (
            mesh.local(self.send, (pair, pair, noise, *inputs), outputs, shapes, types),
            mesh.local(self.send_forced, (pair, pair, noise, forced, *inputs), outputs, shapes, types),
        )

    def _results(self, dispatcher: Dispatcher, groups: int) -> tuple[Callable, Callable]:
        """Returns two functions: full shapes, and types, of the arguments of `send` -> those of its results."""
        columns, choices, records = width(self.expert_num), self.choices, self.records

        def shapes(tokens, *rest):
            chosen = ([tokens[0], choices],) if records else ()
            return (*dispatcher.shapes(groups, *tokens), [groups, columns], *chosen)

        def types(tokens, *rest):
            chosen = (mstype.int32,) if records else ()
            return (*dispatcher.types(tokens), tokens, *chosen)

        return shapes, types


def create_experts(
    config: Config, std: tuple[float, float], random: InitialWeights, dtype, make: Callable | None, fused: frozenset
) -> tuple[nn.Cell, nn.Cell | None]:
    """Returns the experts of a layer, and its shared experts or None; arguments: see MoELayer."""
    moe, hidden, shared = config.moe, config.expert_width, None
    make = make or own_experts(config, std, random, dtype)
    if make is not None:
        experts = make(moe.expert_num, hidden)
    else:
        size, kind = config.model.hidden_size, config.model.activation
        half = "HalfRows" in fused and find_router(moe.router).form == "token_choice" and moe.dispatcher is None
        experts = FeedForwardExperts(
            moe.expert_num, size, hidden, kind, std, random, dtype, fused=fused, half_rows=half
        )
    if moe.shared_expert_num and make is not None:
        shared = make(1, config.shared_width)
    elif moe.shared_expert_num:
        shared = SharedExperts(config, std, random, dtype, fused)
    return experts, shared


def require_able(moe: MoEConfig) -> None:
    """Refuses options that the router cannot serve (UserError)."""
    asked = moe.record is not None or moe.replay is not None or moe.force_balance or moe.router_warmup_steps
    if asked or moe.dispatch != "capacity":
        require_choices(moe)
    require_learnable(moe)


def flat(tokens: Tensor) -> Tensor:
    """Returns [F, D] of [G, N, D]; [F, D] stays as it is, without an operator."""
    return tokens.reshape(-1, tokens.shape[2]) if len(tokens.shape) == 3 else tokens


def flat_ids(ids: Tensor) -> Tensor:
    """Returns [F] of [G, N]; [F] stays as it is, without an operator."""
    return ids.reshape(-1) if len(ids.shape) == 2 else ids


class RoundRobinRouting(nn.Cell):
    """Makes choices that balance perfectly, to time what the best router could give.

    Choice k of token n is expert n * K + k, modulo E; of each replica group where there are several.
    """

    def __init__(self, moe: MoEConfig):
        super().__init__()
        self.each, self.copies, self.size = moe.num_experts_chosen, moe.copies, moe.expert_num // moe.copies

    def construct(self, valid: Tensor) -> Tensor:
        """Takes valid [G, N], returns experts [G, N, K] int32."""
        rows = ops.arange(valid.shape[1]) * self.each  # [N]
        experts = ()
        for choice in range(self.each * self.copies):
            turn = (rows + choice % self.each) % self.size + choice // self.each * self.size
            experts = (*experts, turn.astype(mstype.int32))
        in_turn = ops.stack(experts, -1)  # [N, K]
        return ops.tile(ops.expand_dims(in_turn, 0), (valid.shape[0], 1, 1))
