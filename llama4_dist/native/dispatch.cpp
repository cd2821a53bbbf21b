// What dispatch does for every frame, as a Python module: frames to sockets and from them, the order of rows, and
// looking at descriptors. Each has its equal in Python, which also does what is rare. Empty where Python's headers
// are missing.
#if __has_include(<Python.h>)
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <cerrno>
#include <chrono>
#include <new>

#include "frames.h"

extern "C" {
void l4d_scale_in_order_float32(const void*, int64_t, const void*, int64_t, const int64_t*, int64_t, int64_t, void*);
void l4d_scale_in_order_bfloat16(const void*, int64_t, const void*, int64_t, const int64_t*, int64_t, int64_t, void*);
int l4d_put_if_finite_float32(const void*, const int64_t*, int64_t, int64_t, void*);
int l4d_put_if_finite_bfloat16(const void*, const int64_t*, int64_t, int64_t, void*);
}

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

// ---- Frames of one link

struct Codec {
    PyObject_HEAD
    frames::Rules rules;
    PyObject* header_type;
    PyObject* kinds;  // a tuple: FrameKind by its number
    std::vector<uint8_t> head;
    frames::Header header;
    frames::Place place;
};

PyObject* new_codec(PyTypeObject* type, PyObject* arguments, PyObject*) {
    frames::Rules rules;
    PyObject *header_type, *kinds;
    if (!PyArg_ParseTuple(arguments, "O!O!KKKKKKKK", &PyType_Type, &header_type, &PyTuple_Type, &kinds, &rules.width,
                          &rules.row_bytes, &rules.dtype_code, &rules.num_layers, &rules.num_experts, &rules.max_rows,
                          &rules.max_header_bytes, &rules.num_shared_bytes)) {
        return nullptr;
    }
    auto* self = reinterpret_cast<Codec*>(type->tp_alloc(type, 0));
    if (!self) return nullptr;
    self->rules = rules;
    self->header_type = Py_NewRef(header_type);
    self->kinds = Py_NewRef(kinds);
    new (&self->head) std::vector<uint8_t>();
    new (&self->header) frames::Header();
    return reinterpret_cast<PyObject*>(self);
}

void free_codec(PyObject* object) {
    auto* self = reinterpret_cast<Codec*>(object);
    PyTypeObject* type = Py_TYPE(object);
    Py_DECREF(self->header_type);
    Py_DECREF(self->kinds);
    self->head.~vector();
    self->header.~Header();
    type->tp_free(object);
    Py_DECREF(type);
}

bool read_groups(PyObject* groups, frames::Groups& to) {
    if (!PyTuple_Check(groups)) return false;
    to.resize(PyTuple_GET_SIZE(groups));
    for (size_t index = 0; index < to.size(); ++index) {
        PyObject* group = PyTuple_GET_ITEM(groups, index);
        if (!PyTuple_Check(group) || PyTuple_GET_SIZE(group) != 2) return false;
        to[index] = {PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(group, 0)),
                     PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(group, 1))};
    }
    return !PyErr_Occurred();
}

// A FrameHeader as it is in Python; false where it is none, or of a kind that Python has to send.
bool read_header(PyObject* object, frames::Header& to) {
    if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 8) return false;
    to.kind = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(object, 0));
    uint64_t* fields[] = {&to.number, &to.step, &to.microbatch, &to.layer, &to.num_rows};
    for (int field = 0; field < 5; ++field) *fields[field] = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(object, field + 1));
    return !PyErr_Occurred() && frames::is_known(to.kind) && read_groups(PyTuple_GET_ITEM(object, 6), to.groups);
}

// post(descriptor, header, sequence, rows, their bytes, offset, read) -> (bytes of the frame, bytes the kernel took), or
// None where Python has to do it. An offset of -1 = the rows follow; otherwise they are there in shared memory.
PyObject* post(PyObject* object, PyObject* const* arguments, Py_ssize_t count) {
    auto* self = reinterpret_cast<Codec*>(object);
    if (!is_count(count, 7)) return nullptr;
    const int descriptor = PyLong_AsLong(arguments[0]);
    const uint64_t sequence = PyLong_AsUnsignedLongLong(arguments[2]);
    uint8_t* rows = address(arguments[3]);
    const size_t num_bytes = PyLong_AsSize_t(arguments[4]);
    const int64_t offset = PyLong_AsLongLong(arguments[5]), num_read = PyLong_AsLongLong(arguments[6]);
    const frames::Place place{offset >= 0, uint64_t(offset), uint64_t(num_read)};
    const size_t payload = place.is_shared ? 0 : num_bytes;
    if (PyErr_Occurred()) return nullptr;
    if (!read_header(arguments[1], self->header)) return PyErr_Occurred() ? nullptr : Py_NewRef(Py_None);
    if (num_bytes != self->header.num_rows * self->rules.row_bytes) return Py_NewRef(Py_None);
    ssize_t sent;
    bool is_encoded;
    {
        Turn turn(payload >= LARGE);
        is_encoded = frames::encode(self->header, place, sequence, self->rules, rows, self->head);
        if (is_encoded) {
            iovec parts[2] = {{self->head.data(), self->head.size()}, {rows, payload}};
            msghdr message{};
            message.msg_iov = parts, message.msg_iovlen = 2;
            do sent = sendmsg(descriptor, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
            while (sent < 0 && errno == EINTR);
        }
    }
    if (!is_encoded) return Py_NewRef(Py_None);
    if (sent < 0 && errno != EAGAIN) return PyErr_SetFromErrno(PyExc_OSError);
    return Py_BuildValue("(nn)", Py_ssize_t(self->head.size() + payload), Py_ssize_t(sent < 0 ? 0 : sent));
}

PyObject* new_header(const Codec* self) {
    const frames::Header& header = self->header;
    PyObject* result = new_tuple(self->header_type, 8);
    PyObject* groups = PyTuple_New(header.groups.size());
    if (!result || !groups) return nullptr;
    for (size_t index = 0; index < header.groups.size(); ++index) {
        const auto& [expert, num_rows] = header.groups[index];
        PyTuple_SET_ITEM(groups, index, Py_BuildValue("(KK)", expert, num_rows));
    }
    PyTuple_SET_ITEM(result, 0, Py_NewRef(PyTuple_GET_ITEM(self->kinds, header.kind)));
    const uint64_t fields[] = {header.number, header.step, header.microbatch, header.layer, header.num_rows};
    for (int field = 0; field < 5; ++field) PyTuple_SET_ITEM(result, field + 1, PyLong_FromUnsignedLongLong(fields[field]));
    PyTuple_SET_ITEM(result, 6, groups);
    PyTuple_SET_ITEM(result, 7, PyUnicode_FromString(""));
    return PyErr_Occurred() ? nullptr : result;
}

struct Slot {
    uint8_t* bytes;
    size_t num_bytes;
};

enum class Read { complete, waiting, unclear, ended, failed };

// Receives until a frame is there that is as it must be, or the kernel has no more (waiting), or Python has to look
// (unclear); `filled` counts what is there.
Read read_frame(Codec* self, int descriptor, Slot slot, size_t first, uint64_t sequence, size_t& filled,
                frames::Prefix& prefix) {
    for (;;) {
        if (filled >= frames::PREFIX_BYTES) {
            if (!frames::read_prefix(slot.bytes, self->rules, prefix)) return Read::unclear;
            if (filled > prefix.frame_length || prefix.frame_length > slot.num_bytes) return Read::unclear;
            if (filled == prefix.frame_length) {
                const bool is_valid = frames::decode(slot.bytes, prefix, sequence, self->rules, self->header, self->place);
                return is_valid ? Read::complete : Read::unclear;
            }
        }
        const size_t end = filled >= frames::PREFIX_BYTES ? prefix.frame_length : first;
        const ssize_t received = recv(descriptor, slot.bytes + filled, end - filled, MSG_DONTWAIT);
        if (received == 0) return Read::ended;
        if (received < 0 && errno == EINTR) continue;
        if (received < 0) return errno == EAGAIN ? Read::waiting : Read::failed;
        filled += received;
    }
}

// receive(descriptor, slot, its bytes, filled, first, sequence, seconds to look) -> (header, where the rows start,
// bytes of the frame, offset, replies read); an offset of -1 = the rows are in the frame. Or the
// bytes that are in the slot now, where Python has to look at them; as -1 - bytes where the stream has ended.
// Up to `first` bytes are read before a frame's length is known. What is not there yet is looked for again and again,
// so many seconds long, other threads of this core first.
PyObject* receive(PyObject* object, PyObject* const* arguments, Py_ssize_t count) {
    auto* self = reinterpret_cast<Codec*>(object);
    if (!is_count(count, 7)) return nullptr;
    const int descriptor = PyLong_AsLong(arguments[0]);
    const Slot slot{address(arguments[1]), PyLong_AsSize_t(arguments[2])};
    size_t filled = PyLong_AsSize_t(arguments[3]);
    const size_t first = std::min(PyLong_AsSize_t(arguments[4]), slot.num_bytes);
    const uint64_t sequence = PyLong_AsUnsignedLongLong(arguments[5]);
    const double look_s = PyFloat_AsDouble(arguments[6]);
    if (PyErr_Occurred()) return nullptr;
    frames::Prefix prefix;
    Read read;
    {
        Turn turn(filled >= LARGE || look_s > 0);
        read = read_frame(self, descriptor, slot, first, sequence, filled, prefix);
        if (read == Read::waiting && look_s > 0) {
            const double until = seconds() + look_s;
            while (read == Read::waiting && seconds() < until) {
                sched_yield();
                read = read_frame(self, descriptor, slot, first, sequence, filled, prefix);
            }
        }
    }
    if (read == Read::failed) return PyErr_SetFromErrno(PyExc_OSError);
    if (read == Read::ended) return PyLong_FromSsize_t(-1 - Py_ssize_t(filled));
    if (read != Read::complete) return PyLong_FromSize_t(filled);
    PyObject* header = new_header(self);
    if (!header) return nullptr;
    const bool is_shared = self->place.is_shared;
    const long long offset = is_shared ? self->place.offset : -1, num_read = is_shared ? self->place.num_read : 0;
    return Py_BuildValue("(NnnLL)", header, Py_ssize_t(prefix.start), Py_ssize_t(filled), offset, num_read);
}

PyMethodDef codec_methods[] = {
    {"post", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(post)), METH_FASTCALL, nullptr},
    {"receive", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(receive)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyType_Slot codec_slots[] = {{Py_tp_new, reinterpret_cast<void*>(new_codec)},
                             {Py_tp_dealloc, reinterpret_cast<void*>(free_codec)},
                             {Py_tp_methods, codec_methods},
                             {0, nullptr}};
PyType_Spec codec_spec = {"llama4_dist.native.dispatch.Codec", sizeof(Codec), 0, Py_TPFLAGS_DEFAULT, codec_slots};

// ---- Which row goes where

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
        for (; key < num_keys && PyTuple_GET_ITEM(PyTuple_GET_ITEM(destinations, key), 0) == host; ++key) {
            if (starts[key + 1] == starts[key]) continue;
            PyObject* expert = PyTuple_GET_ITEM(PyTuple_GET_ITEM(destinations, key), 1);
            PyObject* group = Py_BuildValue("(OL)", expert, starts[key + 1] - starts[key]);
            PyList_Append(groups, group);
            Py_XDECREF(group);
        }
        const int64_t num_rows = starts[key] - start;
        if (num_rows) {
            PyObject* share = new_tuple(share_type, 5);
            PyObject *from = PyLong_FromLongLong(start), *to = PyLong_FromLongLong(start + num_rows);
            PyTuple_SET_ITEM(share, 0, Py_NewRef(host));
            PyTuple_SET_ITEM(share, 1, PyLong_FromLong(0));
            PyTuple_SET_ITEM(share, 2, PySlice_New(from, to, nullptr));
            PyTuple_SET_ITEM(share, 3, PyList_AsTuple(groups));
            PyTuple_SET_ITEM(share, 4, PyLong_FromLongLong(num_rows));
            PyList_Append(shares, share);
            Py_DECREF(from), Py_DECREF(to), Py_DECREF(share);
        }
        Py_DECREF(groups);
    }
    return PyErr_Occurred() ? nullptr : shares;
}

// ---- Rows

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
    if (!is_inside) PyErr_SetString(PyExc_ValueError, "a position is outside of the order, or a copy outside of the rows");
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
    if (arguments[0] == Py_True) {
        l4d_scale_in_order_bfloat16(x, stride, scores, num_slots, rows.order + rows.start, num_rows, width, out + 2 * first);
    } else {
        l4d_scale_in_order_float32(x, stride, scores, num_slots, rows.order + rows.start, num_rows, width, out + 4 * first);
    }
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

// ---- Waiting

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
        PyObject* event = Py_BuildValue("(ik)", events[index].data.fd, static_cast<unsigned long>(events[index].events));
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
