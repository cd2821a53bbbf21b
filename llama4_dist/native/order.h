// Which row goes where, and the rows there and back, for Python. Memory is checked before it is touched.
#pragma once

#include "python.h"

#include <vector>

extern "C" {
void l4d_scale_in_order_float32(const void*, int64_t, const void*, int64_t, const int64_t*, int64_t, int64_t, void*);
void l4d_scale_in_order_bfloat16(const void*, int64_t, const void*, int64_t, const int64_t*, int64_t, int64_t, void*);
int l4d_put_if_finite_float32(const void*, const int64_t*, int64_t, int64_t, void*);
int l4d_put_if_finite_bfloat16(const void*, const int64_t*, int64_t, int64_t, void*);
}

namespace {

// A table that came by a socket names a host by as many objects as it has experts.
inline bool is_same_host(PyObject* a, PyObject* b) { return a == b || PyUnicode_Compare(a, b) == 0; }

// lay_out(share type, destinations, keys, experts, number of copies, order) -> shares | None
// `destinations` are (host, expert) in ascending order; keys[expert] (uint16) is an expert's place in them. Writes the
// copies' order (int64). None where Python has to do it: an expert is unknown or has no destination.
PyObject* lay_out(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (!is_count(count, 6)) return nullptr;
    PyObject *share_type = arguments[0], *destinations = arguments[1];
    const Lent lent_keys(arguments[2], UINT16), lent_order(arguments[5], INT64, true);
    const auto* experts = reinterpret_cast<const int64_t*>(address(arguments[3]));
    const int64_t num_copies = PyLong_AsLongLong(arguments[4]);
    if (PyErr_Occurred()) return nullptr;
    if (!lent_keys.is_valid || !lent_order.is_valid || lent_order.num_items() != num_copies) return Py_NewRef(Py_None);
    const auto* keys = lent_keys.items<uint16_t>();
    const int64_t num_experts = lent_keys.num_items();
    auto* order = lent_order.items<int64_t>();
    const size_t num_keys = PyTuple_GET_SIZE(destinations);
    std::vector<int64_t> starts(num_keys + 1, 0);
    for (int64_t copy = 0; copy < num_copies; ++copy) {
        const int64_t expert = experts[copy];
        if (expert < 0 || expert >= num_experts || keys[expert] >= num_keys) return Py_NewRef(Py_None);
        ++starts[keys[expert] + 1];
    }
    for (size_t key = 0; key < num_keys; ++key) starts[key + 1] += starts[key];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t copy = 0; copy < num_copies; ++copy) order[next[keys[experts[copy]]]++] = copy;
    PyObject* shares = PyList_New(0);
    for (size_t key = 0; key < num_keys;) {
        PyObject* host = PyTuple_GET_ITEM(PyTuple_GET_ITEM(destinations, key), 0);
        const int64_t start = starts[key];
        PyObject* groups = PyList_New(0);
        for (; key < num_keys && is_same_host(PyTuple_GET_ITEM(PyTuple_GET_ITEM(destinations, key), 0), host); ++key) {
            if (starts[key + 1] == starts[key]) continue;
            PyObject* expert = PyTuple_GET_ITEM(PyTuple_GET_ITEM(destinations, key), 1);
            PyObject* group = Py_BuildValue("(OL)", expert, starts[key + 1] - starts[key]);
            PyList_Append(groups, group);
            Py_XDECREF(group);
        }
        const int64_t num_rows = starts[key] - start;
        if (num_rows) {
            PyObject* share = new_tuple(share_type, 4);
            PyObject *from = PyLong_FromLongLong(start), *to = PyLong_FromLongLong(start + num_rows);
            PyTuple_SET_ITEM(share, 0, Py_NewRef(host));
            PyTuple_SET_ITEM(share, 1, PySlice_New(from, to, nullptr));
            PyTuple_SET_ITEM(share, 2, PyList_AsTuple(groups));
            PyTuple_SET_ITEM(share, 3, PyLong_FromLongLong(num_rows));
            PyList_Append(shares, share);
            Py_DECREF(from), Py_DECREF(to), Py_DECREF(share);
        }
        Py_DECREF(groups);
    }
    return PyErr_Occurred() ? nullptr : shares;
}

struct Rows {
    int64_t start, stop;
    const int64_t* order;
};

// The positions [start, stop) of an order; false where they are not all in it, or a copy is none of `num_copies`.
bool read_rows(const Lent& order, PyObject* start, PyObject* stop, int64_t num_copies, Rows& rows) {
    rows = {PyLong_AsLongLong(start), PyLong_AsLongLong(stop), order.items<int64_t>()};
    if (PyErr_Occurred()) return false;
    bool is_inside = order.is_valid && rows.start >= 0 && rows.start <= rows.stop && rows.stop <= order.num_items();
    for (int64_t row = rows.start; is_inside && row < rows.stop; ++row) {
        is_inside = rows.order[row] >= 0 && rows.order[row] < num_copies;
    }
    if (!is_inside) PyErr_SetString(PyExc_ValueError, "a position outside of the order, or a copy outside of the rows");
    return is_inside;
}

// scale_in_order(is bfloat16, x, its stride, tokens, scores, slots, order, start, stop, width, out); see rows.cpp
PyObject* scale_in_order(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (!is_count(count, 11)) return nullptr;
    const int64_t stride = PyLong_AsLongLong(arguments[2]), num_tokens = PyLong_AsLongLong(arguments[3]);
    const int64_t num_slots = PyLong_AsLongLong(arguments[5]), width = PyLong_AsLongLong(arguments[9]);
    const Lent order(arguments[6], INT64);
    Rows rows;
    if (PyErr_Occurred() || !read_rows(order, arguments[7], arguments[8], num_tokens * num_slots, rows)) return nullptr;
    const int64_t num_rows = rows.stop - rows.start, first = rows.start * width;
    const auto *x = address(arguments[1]), *scores = address(arguments[4]);
    auto* out = address(arguments[10]);
    Turn turn(size_t(num_rows * width) * 4 >= LARGE);
    const bool is_bfloat16 = arguments[0] == Py_True;
    (is_bfloat16 ? l4d_scale_in_order_bfloat16 : l4d_scale_in_order_float32)(
        x, stride, scores, num_slots, rows.order + rows.start, num_rows, width, out + (is_bfloat16 ? 2 : 4) * first);
    Py_RETURN_NONE;
}

// put_if_finite(is bfloat16, rows, order, start, stop, width, copies, out) -> bool; see rows.cpp
PyObject* put_if_finite(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (!is_count(count, 8)) return nullptr;
    const Lent order(arguments[2], INT64);
    const int64_t width = PyLong_AsLongLong(arguments[5]), num_copies = PyLong_AsLongLong(arguments[6]);
    Rows rows;
    if (PyErr_Occurred() || !read_rows(order, arguments[3], arguments[4], num_copies, rows)) return nullptr;
    const int64_t num_rows = rows.stop - rows.start;
    auto *from = address(arguments[1]), *out = address(arguments[7]);
    const bool is_bfloat16 = arguments[0] == Py_True;
    bool is_finite;
    {
        Turn turn(size_t(num_rows * width) * 4 >= LARGE);
        is_finite = (is_bfloat16 ? l4d_put_if_finite_bfloat16 : l4d_put_if_finite_float32)(
            from, rows.order + rows.start, num_rows, width, out);
    }
    return PyBool_FromLong(is_finite);
}

}  // namespace
