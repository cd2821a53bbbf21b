// Frames of rows as bytes, as dispatch/frame.py has them: what it writes is equal to the byte, and what it takes for
// valid is. It knows no reasons: what it does not take, or does not know, Python looks at again and names.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "xxh3.h"

namespace frames {

constexpr size_t FRONT_BYTES = 16, PREFIX_BYTES = 40, ALIGNMENT = 64;
constexpr uint64_t HEADER_FIELDS = 9, MAX_INT = uint64_t(1) << 63;
constexpr uint32_t ROWS = 1, REPLY = 2, ADOPT = 4;
constexpr uint8_t FRONT[6] = {'L', '4', 'D', 'F', 1, 0};  // magic, version; flags follow
constexpr uint16_t SHARED = 1;  // the flag

struct Rules {
    uint64_t width, row_bytes, dtype_code, num_layers, num_experts, max_rows, max_header_bytes, num_shared_bytes;
};

// Where rows lie in shared memory, and how many of the other side's replies there were read.
struct Place {
    bool is_shared;
    uint64_t offset, num_read;
};

using Groups = std::vector<std::pair<uint64_t, uint64_t>>;  // (expert, num_rows)

struct Header {
    uint32_t kind;
    uint64_t number, step, microbatch, layer, num_rows;
    Groups groups;
};

struct Prefix {
    uint32_t kind;
    bool is_shared;
    size_t header_length, start, frame_length;
};

inline bool is_known(uint32_t kind) { return kind == ROWS || kind == REPLY || kind == ADOPT; }

inline size_t padded(size_t header_length) {
    return (PREFIX_BYTES + header_length + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

template <typename T>
T read(const uint8_t* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <typename T>
void write(uint8_t* to, T value) {
    std::memcpy(to, &value, sizeof value);
}

// A msgpack array of counts, of which only the shortest form is written.
class Writer {
  public:
    explicit Writer(std::vector<uint8_t>& bytes) : bytes_(bytes) {}

    void array(size_t length) {
        if (length < 16) {
            bytes_.push_back(0x90 | length);
        } else {
            put(0xdc, length, 2);
        }
    }

    void count(uint64_t value) {
        if (value < 0x80) {
            bytes_.push_back(value);
        } else if (value <= 0xff) {
            put(0xcc, value, 1);
        } else if (value <= 0xffff) {
            put(0xcd, value, 2);
        } else if (value <= 0xffffffff) {
            put(0xce, value, 4);
        } else {
            put(0xcf, value, 8);
        }
    }

    void no_text() { bytes_.push_back(0xa0); }

  private:
    void put(uint8_t type, uint64_t value, int num_bytes) {
        bytes_.push_back(type);
        while (num_bytes--) bytes_.push_back(value >> 8 * num_bytes);
    }

    std::vector<uint8_t>& bytes_;
};

// The same, read. What msgpack allows beyond it counts as broken here.
class Reader {
  public:
    Reader(const uint8_t* from, size_t length) : at_(from), end_(from + length) {}

    bool array(uint64_t& length) {
        if (at_ == end_) return false;
        const uint8_t type = *at_++;
        length = type & 0x0f;
        return (type & 0xf0) == 0x90 || (type == 0xdc && take(length, 2));
    }

    bool count(uint64_t& value) {
        if (at_ == end_) return false;
        value = *at_++;
        if (value < 0x80) return true;
        return value >= 0xcc && value <= 0xcf && take(value, 1 << (value - 0xcc)) && value < MAX_INT;
    }

    bool no_text() { return at_ != end_ && *at_++ == 0xa0; }
    bool is_at_end() const { return at_ == end_; }

  private:
    bool take(uint64_t& value, int num_bytes) {
        if (end_ - at_ < num_bytes) return false;
        for (value = 0; num_bytes; --num_bytes) value = value << 8 | *at_++;
        return true;
    }

    const uint8_t *at_, *end_;
};

// Writes prefix and header to `head`, to be sent before the rows, which do not follow where they are shared; false
// where the header is longer than agreed.
inline bool encode(const Header& header, const Place& place, uint64_t sequence, const Rules& rules, const uint8_t* rows,
                   std::vector<uint8_t>& head) {
    head.assign(PREFIX_BYTES, 0);
    Writer writer(head);
    writer.array(HEADER_FIELDS + 2 * place.is_shared);
    for (uint64_t value : {header.number, header.step, header.microbatch, header.layer, header.num_rows,
                           rules.dtype_code, rules.width}) {
        writer.count(value);
    }
    writer.array(header.groups.size());
    for (const auto& [expert, num_rows] : header.groups) {
        writer.array(2);
        writer.count(expert);
        writer.count(num_rows);
    }
    writer.no_text();
    if (place.is_shared) writer.count(place.offset), writer.count(place.num_read);
    const size_t header_length = head.size() - PREFIX_BYTES;
    if (header_length > rules.max_header_bytes) return false;
    head.resize(padded(header_length), 0);
    const uint64_t payload = place.is_shared ? 0 : header.num_rows * rules.row_bytes;
    std::memcpy(head.data(), FRONT, sizeof FRONT);
    write<uint16_t>(&head[6], place.is_shared ? SHARED : 0);
    write<uint64_t>(&head[16], sequence);
    write<uint64_t>(&head[24], payload);
    write<uint32_t>(&head[32], header_length);
    write<uint32_t>(&head[36], header.kind);
    const size_t hashed = head.size() - FRONT_BYTES;
    write<uint64_t>(&head[8], xxh3::hash(&head[FRONT_BYTES], hashed, rows, payload));
    return true;
}

// Reads the first PREFIX_BYTES of a frame; false where they are not valid, or of a kind without rows.
inline bool read_prefix(const uint8_t* frame, const Rules& rules, Prefix& prefix) {
    prefix.header_length = read<uint32_t>(frame + 32);
    prefix.kind = read<uint32_t>(frame + 36);
    const uint64_t payload = read<uint64_t>(frame + 24);
    const auto flags = read<uint16_t>(frame + 6);
    prefix.is_shared = flags == SHARED;
    if (flags > (rules.num_shared_bytes ? SHARED : 0)) return false;
    if (std::memcmp(frame, FRONT, sizeof FRONT) != 0 || !is_known(prefix.kind)) return false;
    if (!prefix.header_length || prefix.header_length > rules.max_header_bytes) return false;
    if (payload > rules.max_rows * rules.row_bytes) return false;
    prefix.start = padded(prefix.header_length);
    prefix.frame_length = prefix.start + payload;
    return true;
}

// Groups cover the rows of a question, experts ascending; an answer has none.
inline bool read_groups(Reader& reader, const Rules& rules, Header& header) {
    uint64_t num_groups, total = 0, next_expert = 0;
    if (!reader.array(num_groups) || num_groups > rules.num_experts) return false;
    header.groups.resize(num_groups);
    for (auto& [expert, num_rows] : header.groups) {
        uint64_t length;
        if (!reader.array(length) || length != 2 || !reader.count(expert) || !reader.count(num_rows)) return false;
        if (expert < next_expert || expert >= rules.num_experts) return false;
        if (num_rows < 1 || num_rows > rules.max_rows) return false;
        next_expert = expert + 1;
        total += num_rows;
    }
    return total == (header.kind == REPLY ? 0 : header.num_rows);
}

// Rows lie inside of the memory, on an aligned address.
inline bool read_place(Reader& reader, const Rules& rules, const Header& header, Place& place) {
    if (!reader.count(place.offset) || !reader.count(place.num_read) || place.offset % ALIGNMENT) return false;
    const uint64_t num_bytes = header.num_rows * rules.row_bytes;
    return num_bytes <= rules.num_shared_bytes && place.offset <= rules.num_shared_bytes - num_bytes;
}

// Reads a complete frame; false where any of it is not as it must be.
inline bool decode(const uint8_t* frame, const Prefix& prefix, uint64_t sequence, const Rules& rules, Header& header,
                   Place& place) {
    if (read<uint64_t>(frame + 16) != sequence) return false;
    if (read<uint64_t>(frame + 8) != xxh3::hash(frame + FRONT_BYTES, prefix.frame_length - FRONT_BYTES)) return false;
    for (size_t byte = PREFIX_BYTES + prefix.header_length; byte < prefix.start; ++byte) {
        if (frame[byte]) return false;
    }
    Reader reader(frame + PREFIX_BYTES, prefix.header_length);
    uint64_t num_fields, dtype_code, width;
    header.kind = prefix.kind;
    place.is_shared = prefix.is_shared;
    if (!reader.array(num_fields) || num_fields != HEADER_FIELDS + 2 * prefix.is_shared) return false;
    for (uint64_t* field : {&header.number, &header.step, &header.microbatch, &header.layer, &header.num_rows,
                            &dtype_code, &width}) {
        if (!reader.count(*field)) return false;
    }
    if (dtype_code != rules.dtype_code || width != rules.width || header.layer >= rules.num_layers) return false;
    if (header.num_rows < 1 || header.num_rows > rules.max_rows) return false;
    if (prefix.frame_length - prefix.start != (prefix.is_shared ? 0 : header.num_rows * rules.row_bytes)) return false;
    if (!read_groups(reader, rules, header) || !reader.no_text()) return false;
    return (!place.is_shared || read_place(reader, rules, header, place)) && reader.is_at_end();
}

}  // namespace frames
