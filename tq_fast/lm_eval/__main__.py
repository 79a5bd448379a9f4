"""`python -m tq_fast.lm_eval` is `lm-eval` with the model "tq_fast"."""

from lm_eval.__main__ import cli_evaluate

from . import TransferModel as TransferModel

if __name__ == "__main__":
    cli_evaluate()
