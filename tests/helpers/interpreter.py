"""Triton's interpreter, without what it does over and over."""

import triton.language as tl
from triton.runtime import interpreter


def patch_language_once() -> None:
    """A kernel's launch puts the interpreter's functions into Triton's language, and every call of
    another function in it does so again, for a third of a launch's time: once is enough."""
    if not hasattr(interpreter, "_LangPatchScope"):  # another Triton than the one that is tested
        return
    patch, done = interpreter._patch_lang, set()

    def patch_once(function):
        modules = {id(v) for v in function.__globals__.values() if v is tl or v is tl.core}
        if modules and modules <= done:
            return interpreter._LangPatchScope()
        done.update(modules)
        scope = patch(function)
        restore = scope.restore

        def restore_and_forget() -> None:  # only a launch calls it, at its end
            done.clear()
            restore()

        scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch_once
