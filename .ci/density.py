#!/usr/bin/env python3
"""Fails when the product's code gets denser or larger than its rules allow.

It counts syntax nodes, what the parser sees: folding lines changes nothing. For each file: nodes,
nodes a statement, comprehensions that are nested or have two "for", and texts or lists that are
multiplied by a truth value.
"""

import ast
import sys
from pathlib import Path

MOST_NODES = {
    "longcat_common.py": 6600,
    "prepare_data.py": 4300,
    "cache_latents.py": 1600,
    "validate.py": 3300,
    "train_lora.py": 6300,
    "webui.py": 4300,
}
MOST_NODES_IN_ALL = 26000
MOST_NODES_A_STATEMENT = 8.5
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)


def count(tree):
    """(syntax nodes, statements) of a file, without its docstrings and without Load and Store."""
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS) and ast.get_docstring(node) is not None:
            docstrings |= {node.body[0], node.body[0].value}
    nodes = [node for node in ast.walk(tree) if node not in docstrings]
    nodes = [node for node in nodes if not isinstance(node, (ast.Load, ast.Store, ast.Del))]
    return len(nodes), sum(isinstance(node, ast.stmt) for node in nodes)


def is_nested(comprehension):
    """Whether a comprehension has two "for", or another comprehension in it."""
    inside = [node for node in ast.walk(comprehension) if isinstance(node, COMPREHENSIONS)]
    return len(comprehension.generators) > 1 or len(inside) > 1


def multiplies_by_truth(node):
    """Whether a node is a product of a text or list and a truth value."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
        return False
    sides = (node.left, node.right)
    texts = [
        isinstance(side, (ast.JoinedStr, ast.List))
        or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in sides
    ]
    truths = [
        isinstance(side, (ast.Compare, ast.BoolOp, ast.UnaryOp))
        or (isinstance(side, ast.Call) and getattr(side.func, "id", "") == "bool")
        for side in sides
    ]
    return any(texts) and any(truths)


def problems_of(path, most_nodes):
    """(problems of a file, its nodes)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes, statements = count(tree)
    density = nodes / statements
    print(f"{path.name:20} {nodes:6} nodes of {most_nodes}, {density:.1f} a statement")

    problems = []
    if nodes > most_nodes:
        problems.append(f"{path}: {nodes} syntax nodes, {most_nodes} at most")
    if density > MOST_NODES_A_STATEMENT:
        problems.append(
            f"{path}: {density:.2f} nodes a statement, {MOST_NODES_A_STATEMENT} at most"
        )
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS) and is_nested(node):
            problems.append(f"{path}:{node.lineno}: nested comprehension; make it a loop")
        if multiplies_by_truth(node):
            problems.append(f"{path}:{node.lineno}: text or list times a truth value; use if")
    return problems, nodes


def main():
    problems, total = [], 0
    for name, most_nodes in MOST_NODES.items():
        found, nodes = problems_of(Path(name), most_nodes)
        problems += found
        total += nodes
    print(f"{'all':20} {total:6} nodes of {MOST_NODES_IN_ALL}")
    if total > MOST_NODES_IN_ALL:
        problems.append(f"all files: {total} syntax nodes, {MOST_NODES_IN_ALL} at most")
    print(*problems, sep="\n", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
