// Frames of one link to and from a socket, as a Python type. What it does not know or take is Python's to look at.
#pragma once

#include "python.h"

#include <sched.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <new>

#include "frames.h"

namespace {

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
    for (int field = 0; field < 5; ++field) {
        *fields[field] = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(object, field + 1));
    }
    return !PyErr_Occurred() && frames::is_known(to.kind) && read_groups(PyTuple_GET_ITEM(object, 6), to.groups);
}

// post(descriptor, header, sequence, rows, their bytes, offset, read) -> (bytes of the frame, bytes the kernel took),
// or None where Python has to do it. An offset of -1 = the rows follow; otherwise they are there in shared memory.
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
    for (int field = 0; field < 5; ++field) {
        PyTuple_SET_ITEM(result, field + 1, PyLong_FromUnsignedLongLong(fields[field]));
    }
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
                return frames::decode(slot.bytes, prefix, sequence, self->rules, self->header, self->place)
                           ? Read::complete : Read::unclear;
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

}  // namespace
