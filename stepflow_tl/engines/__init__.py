"""StepFlow inside the evaluation engines that others run: lm-evaluation-harness and Inspect.

1. `options`: StepFlow's options as an engine hands them over, and StepFlow on the engine's model.
2. `lm_harness`: the model class "stepflow" of lm-evaluation-harness.
3. `inspect_plugin` is Inspect's entry point, `inspect_provider` its provider "stepflow".

The tasks, prompts and scorers are the engines'. Nothing is imported here: each engine is an extra.
"""
