"""How far keeping states in fewer bits may move a probability: what tests hold, and what `benchmarks.state_precision` is held to.

Where products are in float32, so on a CPU. A GPU multiplies in bf16 too, for which `tests/serving` has bounds of its own.
"""

from longer.model.state_layout import Precision

TOLERANCE: dict[Precision, float] = {"bf16": 2e-3, "int8": 8e-3, "fp8": 4e-2}
"""Most that a probability moves, whatever the weights of a model of these sizes: twice as much as the most of a thousand. They are
random, and log-odds reach 20; what it costs a trained model is measured by `benchmarks.state_precision`."""
OF_TESTED_MODELS: dict[Precision, float] = {"bf16": 5e-4, "int8": 1e-3, "fp8": 5e-3}
"""The same of the few models that states are tested with elsewhere: less, so that a wrong state does not pass for a rounded one.
A trained model may exceed these."""
