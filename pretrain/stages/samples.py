"""What a run of stage 2 writes at its held-out evaluations: continuations of the same contexts from the same noise every time."""

from itertools import islice
from typing import TYPE_CHECKING

from pretrain.diagnose.text_checks import Reader, prompts_of, sample
from pretrain.stages.dit import DiTStage
from pretrain.stages.latent_space import heldout_rows

if TYPE_CHECKING:
    from pretrain.session import Session

NUM_STEPS, SOLVER = 16, "multistep"
"""A preview; `textldm diagnose` samples as the paper does."""


def continuations(session: "Session") -> list[dict[str, str]]:
    """{"context", "generated", "true"} texts of the first held-out windows; none of a stage that generates nothing. Collective.

    Every rank generates all of them, because under ZeRO-3 it takes all of them to gather the weights.
    """
    stage, config, count = session.stage, session.config, session.config.train.eval_samples
    if not isinstance(stage, DiTStage) or not count:
        return []
    session.watchdog.beat(session.step, "evaluate")
    batches = islice(heldout_rows(config, config.train.eval_rows, micro_batch_rows=1), count)
    prompts = prompts_of(batches, max_tokens=config.diagnose.sample_tokens)[:count]
    if not prompts:
        return []
    scale = config.diagnose.guidance_scale
    _, generated = session.engine.call(lambda: sample(stage, prompts, scale, NUM_STEPS, SOLVER))
    if not session.topology.is_main:
        return []
    reader = Reader(config.data.path, session.manifest)
    contexts, true = ([part.tolist() for part in parts] for parts in zip(*((p.context_T, p.target_T) for p in prompts)))
    columns = {"context": contexts, "generated": generated, "true": true}
    texts = {name: reader.texts(tokens) for name, tokens in columns.items()}
    return [dict(zip(texts, row)) for row in zip(*texts.values())]
