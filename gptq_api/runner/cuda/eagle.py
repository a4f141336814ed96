"""The forward pass of an EAGLE-3 head on CUDA: the kernels of a Llama's layer and a few of torch's between them, all on
buffers that stay where they are, so that a step can be captured."""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_api.kernels import ops
from gptq_api.model.eagle import EagleWeights
from gptq_api.runner.cuda.forward import Context, CudaLlama, in_type
from gptq_api.runner.features import NO_ROW, Features
from gptq_api.runner.inputs import StepInputs


class CudaEagle(CudaLlama):
    """A head on the device. Row i is computed with token i + 1 and the feature of token i, whose slot its keys and
    values have."""

    ahead = 1

    def __init__(
        self,
        head: EagleWeights,
        max_rows: int,
        max_sequences: int,
        max_model_len: int,
        dtype: torch.dtype,
        features: Features,
    ) -> None:
        super().__init__(head.llama, max_rows, max_sequences, max_model_len, dtype)
        self.num_bytes, self._store = head.num_bytes, features
        self._target_ids, self._normed_goes_on = head.target_ids, head.config.norm_before_residual
        self._feature_norm = in_type(head.feature_norm, dtype)
        hidden, device = head.llama.config.hidden_size, self.device
        # Zeros: rows of padding are computed with, and what memory holds by chance may be NaN.
        self._embedded = torch.zeros(max_rows, hidden, dtype=dtype, device=device)
        self._both = torch.zeros(max_rows, 2 * hidden, dtype=dtype, device=device)
        self._row_places = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._draft_logits = torch.zeros(max_sequences, head.config.draft_vocab_size, device=device)

    def forward(
        self,
        inputs: StepInputs[Tensor],
        history: Tensor,
        cache: list[Tensor],
        decode: bool,
        every_row: bool = False,
        drafted: bool = False,
        prompts: bool = False,
    ) -> Tensor:
        """As a Llama's; tokens that the head has no row for are as unlikely as can be. What is sampled from leaves its
        output as the feature of the token behind it."""
        assert not (every_row or drafted or prompts), "a head only drafts"
        rows, num, hidden = len(inputs.positions), len(inputs.last_rows), self._embedded.shape[1]
        [layer], [kv] = self._layers, cache
        x, embedded, both = self._x[:rows], self._embedded[:rows], self._both[:rows]
        ops.embed(history[:, self.ahead :], inputs.row_seat, inputs.positions, self._embedding, embedded)
        ops.rms_norm(embedded, layer.input_norm, self._eps, both[:, :hidden])
        places = torch.add(inputs.slot_mapping, 1, out=self._row_places[:rows])
        torch.index_select(self._store.data, 0, places, out=x)
        ops.rms_norm(x, self._feature_norm, self._eps, both[:, hidden:])
        if self._normed_goes_on:
            x.copy_(both[:, hidden:])
        qkv = layer.qkv.forward(both, self._qkv[:rows])
        where = Context.of(inputs, by_row=False, drafted=False)
        attended = self._attend(qkv, layer, kv, inputs, where, None, decode=decode, prompts=False)
        layer.o.forward(attended, x, residual=x)
        normed = ops.rms_norm(x, layer.post_attention_norm, self._eps, self._normed[:rows])
        gated = layer.gate_up.forward(normed, self._gated[:rows], silu_mul=True)
        layer.down.forward(gated, x, residual=x)
        if not decode:
            x = torch.index_select(x, 0, inputs.last_rows, out=self._last[:num])
        places = torch.add(inputs.next_slots, 1, out=self._row_places[:num])
        self._store.data.index_copy_(0, places, x[:num])
        last = ops.rms_norm(x[:num], self._norm, self._eps, self._normed[:num])
        if self._target_ids is None:
            return self._head(last, self._logits[:num])
        logits = self._head(last, self._draft_logits[:num])
        return self._logits[:num].fill_(NO_ROW).index_copy_(1, self._target_ids, logits)
