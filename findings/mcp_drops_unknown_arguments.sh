#!/usr/bin/env bash
# mcp 2.3.0 (the official Python SDK of the Model Context Protocol), MCPServer.tool: a misspelt argument is no argument.
#
# Expected: a tool that is called with an argument it does not have answers with an error, as the Python function that is
# behind it would, or as it does for an argument of a wrong type.
#
# What happens: the argument is left out and the tool runs with its defaults. The schema that is listed has no
# "additionalProperties": false either, so that a client that checks by the schema lets it pass, too. Who calls is a language model,
# which reads a result as the answer to what it asked: "strength": 3 for "value" steers by the default and looks like an effect of 3.
#
# Output seen (a tool repeat(text, times=1)):
#   {"text": "a", "times": 2} -> aa
#   {"text": "a", "time": 2} -> a
#   {"text": "a", "times": "two"} -> error
#   additionalProperties in the schema: not there
#
# Why: arguments are read by a pydantic model that is made from the function's signature, and pydantic ignores what a model has no
# field for unless it is told to forbid it.
#
# Instead: check the names against the schema oneself, as mcp.server.lowlevel leaves one free to do; or give the tool a single
# parameter that is a pydantic model with extra="forbid".
set -euo pipefail

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet mcp==2.3.0
"$folder/venv/bin/python" - <<'PYTHON' > "$folder/seen" 2> /dev/null
import asyncio
import json

from mcp import Client
from mcp.server.mcpserver import MCPServer

server = MCPServer("finding")


@server.tool()
def repeat(text: str, times: int = 1) -> str:
    """A text some times."""
    return text * times


async def main() -> None:
    async with Client(server) as client:
        for arguments in ({"text": "a", "times": 2}, {"text": "a", "time": 2}, {"text": "a", "times": "two"}):
            result = await client.call_tool("repeat", arguments)
            print(json.dumps(arguments), "->", "error" if result.is_error else result.content[0].text)
        schema = (await client.list_tools()).tools[0].input_schema
        print("additionalProperties in the schema:", schema.get("additionalProperties", "not there"))


asyncio.run(main())
PYTHON

diff "$folder/seen" - <<'SEEN'
{"text": "a", "times": 2} -> aa
{"text": "a", "time": 2} -> a
{"text": "a", "times": "two"} -> error
additionalProperties in the schema: not there
SEEN
cat "$folder/seen"
