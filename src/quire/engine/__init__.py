"""The engine: front end (`llm`, `async_llm`), core (`core`), and the process between them."""
