"""The conditional layer: a router decides, a dispatcher moves tokens, experts compute.

Legend: G routing groups, N tokens of a group, F = G * N tokens, E experts, C capacity, K choices of a token, D width.
On one device G is 1; on a cluster G is the number of data shards, and the transpose [G, E, C, D] <-> [E, G * C, D] is
the only thing that crosses devices.
"""

from collections.abc import Callable

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config import Config, MoEConfig
from switchyard.distributed.mesh import LOCAL, CompiledMesh, LocalMesh, first
from switchyard.errors import UserError
from switchyard.moe.dispatch.dispatchers import Dispatcher, create_dispatcher
from switchyard.moe.experts import FeedForwardExperts
from switchyard.moe.metrics import width
from switchyard.moe.own_classes import require_cut_experts
from switchyard.moe.routing import create_router
from switchyard.moe.routing.base import require_choices, require_learnable
from switchyard.moe.routing.losses import WeightedLosses
from switchyard.moe.routing.own_routers import require_sharded_router
from switchyard.moe.shared_experts import SharedExperts
from switchyard.moe.statistics import statistics
from switchyard.nn.fused import NONE
from switchyard.nn.masks import keep_where
from switchyard.nn.noise import NoiseSlices, UniformRows


class MoELayer(nn.Cell):
    """Tokens [F, D] -> (tokens [F, D], router statistics [G, 6 + 2 E], choices [F, K] or ()).

    A token without a slot comes back as zero, so that the residual carries it; padding too. Router, experts and shared
    experts see zeros in the place of padding, whose contents reach nothing: no output, no loss, no gradient.

    The first three columns of the statistics carry gradients: the auxiliary losses, see moe.metrics. The choices are
    those of the router, int32, where moe.record asks for them.

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
        make_experts: (experts E, hidden width F) -> the experts' cell, [E, S, D] -> [E, S, D], where they are not
            feed-forward on D. It may have `blocks`, which spares work where nothing is dropped.
        fused: operators of the device, see nn.fused.
        mesh: the devices.
        place: which of the model's conditional layers this is, from 0.
    """

    def __init__(
        self,
        config: Config,
        std: tuple[float, float],
        random,
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
        moe, size = config.moe, config.model.hidden_size
        self.config, self.place = config, place
        self.expert_num, self.choices, self.jitter = moe.expert_num, moe.choices, moe.jitter
        self.slice = slices.take(self.jitter > 0)
        self.priority = UniformRows(slices, size, 1) if moe.drop_order == "random" else None
        self.router = create_router(config, random, slices, vocab_size, has_tasks)
        self.decides_whole, self.state_num = self.router.overrides_construct, len(self.router.state())
        self.takes_tokens = vocab_size is not None and "token_ids" in self.router.needs
        self.takes_tasks = has_tasks and "task_ids" in self.router.needs
        hidden, own = config.expert_width, make_experts is not None
        if own:
            self.experts = make_experts(moe.expert_num, hidden)
        else:
            kind = config.model.activation
            self.experts = FeedForwardExperts(moe.expert_num, size, hidden, kind, std, random, dtype, fused=fused)
        self.shared = None
        if moe.shared_expert_num and own:
            self.shared = make_experts(1, hidden * moe.shared_expert_num)
        elif moe.shared_expert_num:
            self.shared = SharedExperts(config, std, random, dtype, fused)
        self.expand_dims, self.add = ops.ExpandDims(), ops.Add()
        self.round_robin = RoundRobinRouting(moe) if moe.force_balance else None
        self.train_dispatcher = create_dispatcher(self.router, config, True, self.experts, fused, mesh)
        self.eval_dispatcher = create_dispatcher(self.router, config, False, self.experts, fused, mesh)
        self.records = moe.record is not None
        self.rest_num = 1 + self.records  # of what `send` returns besides what travels
        asked = self.records or moe.replay is not None or moe.force_balance or moe.router_warmup_steps
        if asked or moe.dispatch != "capacity":
            require_choices(moe)
        require_learnable(moe)
        self.losses = WeightedLosses(moe, self.router, config.model.seq_length // config.row_tokens)
        self.local_hide, self.local_jitter = self.hide_padding, self.add_jitter
        self.local_train, self.local_eval = self.send, self.send
        self.local_train_forced, self.local_eval_forced = self.send_forced, self.send_forced

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
        """Tokens [F, D] or [G, N, D], valid [G, N] (1 = real, 0 = padding), noise [.., F, D] of U(0, 1); ids [F] int32;
        choices to force [M, F, K] int32 of all M conditional layers, -1 where the router's own stand; view [F, D], what
        the router sees where it is not the tokens themselves, which may then be of any width."""
        tokens = self.local_hide(flat(tokens), valid)
        inputs = self.inputs(self.seen(tokens, valid, noise, view), token_ids, task_ids)
        sent = self.dispatched(tokens, valid, noise, replay, inputs)
        # branches stand in methods: behind one, the compiler of a recomputed layer knows no shape of what is in `sent`
        stats, out = sent[-self.rest_num], self.through_experts(sent[: -self.rest_num], tokens)
        return out, stats, sent[-1] if self.records else ()

    def seen(self, tokens: Tensor, valid: Tensor, noise: Tensor, view: Tensor) -> Tensor:
        """What the router sees: [F, D]."""
        seen = tokens if view is None else self.local_hide(flat(view), valid)
        return self.local_jitter(seen, noise) if self.training and self.jitter > 0 else seen

    def dispatched(self, tokens: Tensor, valid: Tensor, noise: Tensor, replay: Tensor, inputs: tuple) -> tuple:
        """What is sent to the experts in training or at evaluation, see `send`."""
        if self.training:
            return self.sent(self.local_train, self.local_train_forced, tokens, valid, noise, replay, inputs)
        return self.sent(self.local_eval, self.local_eval_forced, tokens, valid, noise, replay, inputs)

    def through_experts(self, sent: tuple, tokens: Tensor) -> Tensor:
        """What the experts make of what was sent, and the shared experts of all tokens: [F, D]."""
        if self.training:
            out = self.train_dispatcher.apply(self.experts, sent)
        else:
            out = self.eval_dispatcher.apply(self.experts, sent)
        if self.shared is not None:
            out = self.add(out, self.shared(self.expand_dims(tokens, 0)).reshape(out.shape))
        return out

    def inputs(self, seen: Tensor, token_ids: Tensor, task_ids: Tensor) -> tuple:
        """What the decision is made of: ids [F] where the router reads them, its state, its scores [F, X]."""
        ids = ()
        if self.takes_tokens:
            token_ids = flat_ids(token_ids)
            ids = (*ids, token_ids)
        if self.takes_tasks:
            task_ids = flat_ids(task_ids)
            ids = (*ids, task_ids)
        if self.decides_whole:
            return (*ids, seen)
        return (*ids, *self.router.state(), *self.router.scores(seen, token_ids, task_ids))

    def sent(self, local: Callable, forced: Callable, tokens, valid, noise, replay, inputs) -> tuple:
        """What one device sends to the experts, see `send`."""
        if replay is None:
            return local(tokens, valid, noise, *inputs)
        return forced(tokens, valid, noise, replay, *inputs)

    # ---- from here to `shard` everything is local to one device and reads no Parameter
    def hide_padding(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """Tokens [F, D], zeros where valid [G, N] is 0."""
        return keep_where(tokens, valid.reshape(-1))

    def add_jitter(self, tokens: Tensor, noise: Tensor) -> Tensor:
        """Multiplies tokens [F, D] by a factor near 1 (arXiv 2101.03961, appendix C)."""
        return tokens * (1.0 - self.jitter + 2.0 * self.jitter * noise[self.slice])

    def send(self, tokens: Tensor, valid: Tensor, noise: Tensor, *inputs) -> tuple:
        """Decides, and fills what travels: tokens [F, D] -> (what the dispatcher sends..., statistics [G, 6 + 2 E],
        with moe.record choices [F, K])."""
        replay = self.round_robin(valid) if self.round_robin is not None else None
        return self.decided(tokens, valid, noise, replay, inputs)

    def send_forced(self, tokens: Tensor, valid: Tensor, noise: Tensor, replay: Tensor, *inputs) -> tuple:
        """`send` with choices that are forced: replay [M, F, K] int32."""
        return self.decided(tokens, valid, noise, replay[self.place].reshape(*valid.shape, -1), inputs)

    def decided(self, tokens, valid, noise, replay, inputs) -> tuple:
        """See `send`; replay [G, N, K] int32 or None."""
        routing, tokens = self.route(valid, noise, replay, inputs), tokens.reshape(*valid.shape, -1)  # [G, N, D]
        if not self.training:
            return self.filled(self.eval_dispatcher, tokens, valid, routing)
        if self.priority is not None:
            routing["priority"] = self.priority(noise).reshape(valid.shape)  # [G, N]
        return self.filled(self.train_dispatcher, tokens, valid, routing)

    def filled(self, dispatcher: Dispatcher, tokens: Tensor, valid: Tensor, routing: dict) -> tuple:
        """See `send`; tokens [G, N, D]."""
        sent = dispatcher.send(tokens, routing)
        kept = dispatcher.num_kept(routing, sent)
        stats = statistics(routing, self.losses(routing, valid), kept, valid)
        if self.records:
            return (*sent, stats, ops.stop_gradient(routing["expert_index"]).reshape(-1, self.choices))
        return (*sent, stats)

    def route(self, valid: Tensor, noise: Tensor, replay: Tensor, inputs: tuple) -> dict:
        """Asks the router for its decision; inputs: see the method of that name."""
        groups, context = valid.shape[0], {"valid": valid, "noise": noise, "token_ids": None, "task_ids": None}
        if self.takes_tokens:
            context["token_ids"] = inputs[0].reshape(valid.shape)
            inputs = inputs[1:]
        if self.takes_tasks:
            context["task_ids"] = inputs[0].reshape(valid.shape)
            inputs = inputs[1:]
        if replay is not None:
            context["replay"] = replay
        if self.decides_whole:
            return self.router(inputs[0].reshape(groups, valid.shape[1], -1), context)
        states = self.state_num
        context["state"], scores = inputs[:states], ()
        for score in inputs[states:]:
            scores = (*scores, score.reshape(groups, valid.shape[1], -1))  # [G, N, X]
        return self.router.route(scores, context)

    # ---- layouts
    def shard(self, mesh: CompiledMesh) -> None:
        """Tokens and groups are sharded by data shards, experts by expert shards, see `moe.dispatch` for what lies
        between.

        Raises:
            UserError: a router or a layer that cannot be sharded.
        """
        moe = self.config.moe
        require_sharded_router(self.router, moe.router)
        if self.shared is not None and not isinstance(self.shared, SharedExperts):
            raise UserError(
                f"moe.shared_expert_num: {moe.shared_expert_num}; your own shared experts are not sharded: set it to 0"
            )
        self.router.shard(mesh)
        self._shard_experts(mesh)
        pair, data = mesh.cut("data", None), mesh.degrees.data_parallel
        if self.shared is not None:
            self.shared.shard(mesh)
            self.expand_dims.shard(((data, 1),))
            self.add.shard(((data, 1), (data, 1)))
        self.local_hide = mesh.local(self.hide_padding, (pair, pair), (pair,), first, first)
        if self.jitter > 0:
            self.local_jitter = mesh.local(self.add_jitter, (pair, mesh.noise), (pair,), first, first)
        self.local_train, self.local_train_forced = self._sharded(mesh, self.train_dispatcher, mesh.noise)
        self.local_eval, self.local_eval_forced = self._sharded(mesh, self.eval_dispatcher, mesh.no_noise)

    def _shard_experts(self, mesh: CompiledMesh) -> None:
        """Raises UserError for experts of a user's own that cannot be sharded."""
        run = [one.runs_experts for one in (self.train_dispatcher, self.eval_dispatcher)]
        require_cut_experts(self.experts, self.expert_num, None if all(run) else self.config.moe.dispatch)
        if any(run):
            self.experts.shard(mesh)

    def _sharded(self, mesh: CompiledMesh, dispatcher: Dispatcher, noise) -> tuple[Callable, Callable]:
        """`send` and `send_forced` of a dispatcher, as operators of one device."""
        dispatcher.shard(mesh)
        groups, columns, records = mesh.groups, width(self.expert_num), self.records
        choices, pair, row = self.choices, mesh.cut("data", None), mesh.cut("data")

        def shapes(tokens, *rest):
            sent = dispatcher.shapes(groups, *tokens)
            return (*sent, [groups, columns], *(([tokens[0], choices],) if records else ()))

        def types(tokens, *rest):
            return (*dispatcher.types(tokens), tokens, *((mstype.int32,) if records else ()))

        ids = (row,) * (self.takes_tokens + self.takes_tasks)
        state = tuple(mesh.cut(*(None,) * parameter.ndim) for parameter in self.router.state())
        inputs = (*ids, *state, *(pair,) * self.router.score_num)
        outputs = tuple(mesh.cut("data", *(None,) * (len(shape) - 1)) for shape in shapes((groups, 1)))
        forced = mesh.cut(None, "data", None)
        return (
            mesh.local(self.send, (pair, pair, noise, *inputs), outputs, shapes, types),
            mesh.local(self.send_forced, (pair, pair, noise, forced, *inputs), outputs, shapes, types),
        )


def flat(tokens: Tensor) -> Tensor:
    """[G, N, D] -> [F, D]; [F, D] stays as it is, without an operator."""
    return tokens.reshape(-1, tokens.shape[2]) if len(tokens.shape) == 3 else tokens


def flat_ids(ids: Tensor) -> Tensor:
    """[G, N] -> [F]; [F] stays as it is, without an operator."""
    return ids.reshape(-1) if len(ids.shape) == 2 else ids


class RoundRobinRouting(nn.Cell):
    """Choices that balance perfectly, to time what the best router could give: valid [G, N] -> experts [G, N, K] int32.

    Choice k of token n is expert n * K + k, modulo E; of each replica group where there are several.
    """

    def __init__(self, moe: MoEConfig):
        super().__init__()
        self.each, self.copies, self.size = moe.num_experts_chosen, moe.copies, moe.expert_num // moe.copies

    def construct(self, valid: Tensor) -> Tensor:
        """valid [G, N] -> experts [G, N, K] int32."""
        rows = ops.arange(valid.shape[1]) * self.each  # [N]
        experts = ()
        for choice in range(self.each * self.copies):
            turn = (rows + choice % self.each) % self.size + choice // self.each * self.size
            experts = (*experts, turn.astype(mstype.int32))
        in_turn = ops.stack(experts, -1)  # [N, K]
        return ops.tile(ops.expand_dims(in_turn, 0), (valid.shape[0], 1, 1))
