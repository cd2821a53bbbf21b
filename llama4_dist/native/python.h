// What the parts of the Python module share: turns of other threads, arguments, and memory that Python lends.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <chrono>
#include <cstdint>
#include <cstring>

namespace {

constexpr size_t LARGE = 128 * 1024;  // from so many bytes on, other Python threads run meanwhile

// Lets other threads run where the work is large: handing them a turn may cost more than small work takes.
class Turn {
  public:
    explicit Turn(bool given) : state_(given ? PyEval_SaveThread() : nullptr) {}
    ~Turn() {
        if (state_) PyEval_RestoreThread(state_);
    }

  private:
    PyThreadState* state_;
};

bool is_count(Py_ssize_t given, Py_ssize_t wanted) {
    if (given == wanted) return true;
    PyErr_Format(PyExc_TypeError, "%zd arguments, %zd are needed", given, wanted);
    return false;
}

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

uint8_t* address(PyObject* number) { return static_cast<uint8_t*>(PyLong_AsVoidPtr(number)); }

// A tuple of one of Python's named tuples, to be filled; such a class is a tuple without further fields.
PyObject* new_tuple(PyObject* type, Py_ssize_t length) {
    auto* tuple_type = reinterpret_cast<PyTypeObject*>(type);
    return tuple_type->tp_alloc(tuple_type, length);
}

// Memory that Python lends; `format` names the C types that its items may have.
class Lent {
  public:
    Lent(PyObject* object, const char* formats, bool is_written = false) {
        const int flags = PyBUF_ND | PyBUF_FORMAT | (is_written ? PyBUF_WRITABLE : 0);
        is_lent_ = PyObject_GetBuffer(object, &buffer_, flags) == 0;
        is_valid = is_lent_ && buffer_.ndim == 1 && std::strlen(buffer_.format) == 1 &&
                   std::strchr(formats, buffer_.format[0]) != nullptr;
    }
    ~Lent() {
        if (is_lent_) PyBuffer_Release(&buffer_);
    }
    template <typename T>
    T* items() const {
        return static_cast<T*>(buffer_.buf);
    }
    int64_t num_items() const { return buffer_.shape[0]; }

    bool is_valid;

  private:
    Py_buffer buffer_;
    bool is_lent_;
};

constexpr char INT64[] = "lq", UINT16[] = "H";

}  // namespace
