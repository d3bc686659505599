"""The compiler passes, in the order in which a model goes through them.

lift (operations back to module calls) > partitioners (stages) > schedules (compute order) > communicate (messages)
> verify (the four rules) > codegen (sources).
"""

if __name__ != "pipecompile.passes":
    raise ImportError(f"import the passes as pipecompile.passes, not as {__name__!r}")
