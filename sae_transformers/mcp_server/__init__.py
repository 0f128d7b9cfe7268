"""Tools for agents, by the Model Context Protocol. Only here is `mcp` imported, and only when it is asked for."""
