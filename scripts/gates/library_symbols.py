"""The library reports through fm_status: its objects refer to no function that prints or that ends
the process. Read from the built objects, so that no spelling escapes and no method is mistaken."""

from __future__ import annotations

from .common import BUILD, Finding, GateError, run, tool

FORBIDDEN = {
    *("exit", "_exit", "quick_exit", "abort", "__assert_fail"),
    *("printf", "vprintf", "puts", "putchar", "__printf_chk", "__vprintf_chk", "perror"),
    *("stdout", "stderr", "std::cout", "std::cerr", "std::clog"),
}


def check() -> Finding:
    # Not the binding's: the headers of TVM-FFI bring std::cerr along.
    # Where they lie, not anywhere: beside them other gates make and remove folders meanwhile.
    parts = (
        BUILD / "CMakeFiles" / "flashmoe_core.dir",
        BUILD / "src" / "cuda" / "CMakeFiles" / "flashmoe_cuda.dir",
    )
    objects = sorted(path for part in parts for path in part.glob("**/*.o"))
    if not objects:
        raise GateError("build/release holds no objects: make build")
    problems = []
    for path in objects:
        name = str(path.relative_to(BUILD))
        result = run([tool("nm"), "--undefined-only", "--demangle", "--format=posix", str(path)])
        symbols = {line.rsplit(" U", 1)[0].split("@")[0] for line in result.stdout.splitlines()}
        problems += [f"{name}: refers to {symbol}" for symbol in sorted(symbols & FORBIDDEN)]
    return Finding(problems, f"{len(objects)} objects")
