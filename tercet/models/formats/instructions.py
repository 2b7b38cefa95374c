"""Instructions: what a model is told to do, put before a text as its prompt."""


def as_prompt(instruction: str) -> str:
    r"""The prompt of an instruction, ``Instruct: {instruction}\nQuery: `` (arXiv 2405.17428, 3.3).

    The paper prints two spaces where the published models have a line break; theirs is meant.
    An empty instruction is no prompt.
    """
    instruction = instruction.strip()
    return f"Instruct: {instruction}\nQuery: " if instruction else ""
