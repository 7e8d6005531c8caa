"""Triton's interpreter, without what it does over and over: most of its time goes into that.

Kernels compute the same, in this process, which never compiles one.
"""

import functools

import triton.language as tl
from triton.language import core
from triton.runtime import interpreter


def lighten_interpreter() -> None:
    if not hasattr(interpreter, "_LangPatchScope"):  # another Triton than the one that is tested
        return
    # Whole numbers that overflow are looked for by computing everything twice, and found by
    # assertions that are switched off.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )
    _patch_language_once()
    _remember_types()


def _patch_language_once() -> None:
    """Each launch of a kernel puts the interpreter's functions into Triton's language, and takes
    them out at its end; every call of another function in it puts them in again."""
    patch, nothing = interpreter._patch_lang, interpreter._LangPatchScope()
    modules, functions = set(), set()

    def patch_once(function):
        if function not in functions:
            functions.add(function)
            used = {id(v) for v in function.__globals__.values() if v is tl or v is core}
            if not used or not used <= modules:
                patch(function)
                modules.update(used)
        return nothing  # that could be taken out

    interpreter._patch_lang = patch_once


def _remember_types() -> None:
    """A tensor's type, with its name, and its shape, with types of its own, are made anew for each
    result of each operation; here, a type once, and a shape where somebody looks at it."""
    make, numpy_type = core.block_type.__init__, interpreter._get_np_dtype
    made, numpy_types = {}, {}

    def key_of(element_type, shape):
        return element_type.name, *(getattr(size, "value", size) for size in shape)

    def new_type(cls, element_type, shape):
        return made.get(key_of(element_type, shape)) or object.__new__(cls)

    def make_type(self, element_type, shape):
        if (key := key_of(element_type, shape)) not in made:
            make(self, element_type, shape)
            made[key] = self

    def make_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar

    def sizes(tensor):
        return [*tensor.type.shape] if tensor.type.is_block() else []

    def shape(tensor):
        return core.tuple([core.constexpr(size) for size in sizes(tensor)])

    def numel(tensor):
        return core.constexpr(functools.reduce(int.__mul__, sizes(tensor), 1))

    core.block_type.__new__, core.block_type.__init__ = new_type, make_type
    core.tensor.__init__ = make_tensor
    for name, value in (("shape", shape), ("numel", numel)):
        lazy = functools.cached_property(value)
        lazy.__set_name__(core.tensor, name)
        setattr(core.tensor, name, lazy)

    def get_numpy_type(type):
        if (name := type.scalar.name) not in numpy_types:
            numpy_types[name] = numpy_type(type.scalar)
        return numpy_types[name]

    interpreter._get_np_dtype = get_numpy_type
