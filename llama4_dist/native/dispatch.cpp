// What dispatch does for every frame, as a Python module: frames to sockets and from them, the order of rows, and
// looking at descriptors. Each has its equal in Python, which also does what is rare. Empty where Python's headers
// are missing.
#if __has_include(<Python.h>)
#include "python.h"

#include <sys/epoll.h>

#include "codec.h"
#include "order.h"

namespace {

// look(epoll descriptor, seconds, longest) -> ([(descriptor, events), ...], whether a look came later than `longest`
// after the one before). Each look lets other threads of this core run first.
PyObject* look(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (!is_count(count, 3)) return nullptr;
    const int descriptor = PyLong_AsLong(arguments[0]);
    const double look_s = PyFloat_AsDouble(arguments[1]), longest_s = PyFloat_AsDouble(arguments[2]);
    if (PyErr_Occurred()) return nullptr;
    epoll_event events[64];
    int num_events;
    bool is_late = false;
    {
        Turn turn(true);
        const double began = seconds();
        for (double looked = began;;) {
            num_events = epoll_wait(descriptor, events, 64, 0);
            if (num_events > 0 || (num_events < 0 && errno != EINTR) || looked - began >= look_s) break;
            sched_yield();
            const double now = seconds();
            is_late |= now - looked > longest_s;
            looked = now;
        }
    }
    if (num_events < 0 && errno != EINTR) return PyErr_SetFromErrno(PyExc_OSError);
    PyObject* found = PyList_New(0);
    for (int index = 0; index < num_events; ++index) {
        const auto flags = static_cast<unsigned long>(events[index].events);
        PyObject* event = Py_BuildValue("(ik)", events[index].data.fd, flags);
        PyList_Append(found, event);
        Py_XDECREF(event);
    }
    return PyErr_Occurred() ? nullptr : Py_BuildValue("(NO)", found, is_late ? Py_True : Py_False);
}

PyMethodDef methods[] = {
    {"lay_out", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(lay_out)), METH_FASTCALL, nullptr},
    {"scale_in_order", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(scale_in_order)), METH_FASTCALL, nullptr},
    {"put_if_finite", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(put_if_finite)), METH_FASTCALL, nullptr},
    {"look", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(look)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "dispatch", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_dispatch() {
    PyObject* made = PyModule_Create(&module);
    PyObject* codec = PyType_FromSpec(&codec_spec);
    if (!made || !codec || PyModule_AddObject(made, "Codec", codec) < 0) return nullptr;
    return made;
}
#endif
