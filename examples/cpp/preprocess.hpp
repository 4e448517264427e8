// The preprocessing of a bundle in C++17, without dependencies: RGB bytes go in, what the network takes comes out.
//
// The resize is Pillow's (antialiased, separable, 8 bits with 22 bits of fraction, horizontal before vertical), so the pixels are
// those of rdeploy bit for bit; a test compiles this file and compares. The numbers are those of manifest.json:
// model.preprocessing and variant.resolution.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace rdeploy {

struct Image {  // RGB, interleaved, row by row
    int height = 0, width = 0;
    std::vector<uint8_t> bytes;
};

struct Preprocessing {
    int height, width;  // variant.resolution
    float mean[3], std[3];
    std::string interpolation;  // bilinear, bicubic, lanczos, box or hamming
    double crop_pct;
    bool squash = false;  // crop_mode
    bool antialias = true;  // false: bilinear looks at two pixels along each axis only
};

namespace detail {

inline double sinc(double x) {
    if (x == 0.0) return 1.0;
    x *= M_PI;
    return std::sin(x) / x;
}

struct Filter {
    double support;
    double (*weight)(double);
    bool antialias = true;
};

inline Filter filter_of(const std::string& name) {
    if (name == "bilinear") return {1.0, [](double x) { x = std::fabs(x); return x < 1.0 ? 1.0 - x : 0.0; }};
    if (name == "bicubic")
        return {2.0, [](double x) {
                    const double a = -0.5;
                    x = std::fabs(x);
                    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
                    if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * a;
                    return 0.0;
                }};
    if (name == "lanczos") return {3.0, [](double x) { return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3.0) : 0.0; }};
    if (name == "box") return {0.5, [](double x) { return x > -0.5 && x <= 0.5 ? 1.0 : 0.0; }};
    if (name == "hamming")
        return {1.0, [](double x) {
                    x = std::fabs(x);
                    if (x == 0.0) return 1.0;
                    if (x >= 1.0) return 0.0;
                    x *= M_PI;
                    return std::sin(x) / x * (0.54 + 0.46 * std::cos(x));
                }};
    throw std::invalid_argument("no such filter: " + name);
}

constexpr int kBits = 22;

struct Taps {  // which inputs make one output, and their weights
    int first;
    std::vector<int> weights;
};

inline std::vector<Taps> taps_of(int in, int out, const Filter& filter) {
    const double scale = static_cast<double>(in) / out, stretch = filter.antialias ? std::max(scale, 1.0) : 1.0;
    const double support = filter.support * stretch;
    std::vector<Taps> all(out);
    for (int o = 0; o < out; ++o) {
        const double center = (o + 0.5) * scale;
        const int first = std::max(0, static_cast<int>(center - support + 0.5));
        const int last = std::min(in, static_cast<int>(center + support + 0.5));
        std::vector<double> exact(last - first);
        double sum = 0.0;
        for (int i = 0; i < last - first; ++i) sum += exact[i] = filter.weight((i + first - center + 0.5) * (1.0 / stretch));
        all[o].first = first;
        for (double w : exact) {
            const double scaled = (sum != 0.0 ? w / sum : w) * (1 << kBits);
            all[o].weights.push_back(static_cast<int>(w < 0 ? scaled - 0.5 : scaled + 0.5));
        }
    }
    return all;
}

inline uint8_t clipped(int sum) { return static_cast<uint8_t>(std::clamp(sum >> kBits, 0, 255)); }

inline Image resized(const Image& in, int height, int width, const Filter& filter) {
    Image wide{in.height, width, {}};
    if (width == in.width) {
        wide.bytes = in.bytes;
    } else {
        wide.bytes.resize(static_cast<size_t>(in.height) * width * 3);
        const auto taps = taps_of(in.width, width, filter);
        for (int y = 0; y < in.height; ++y)
            for (int x = 0; x < width; ++x)
                for (int c = 0; c < 3; ++c) {
                    int sum = 1 << (kBits - 1);
                    for (size_t i = 0; i < taps[x].weights.size(); ++i)
                        sum += in.bytes[(static_cast<size_t>(y) * in.width + taps[x].first + i) * 3 + c] * taps[x].weights[i];
                    wide.bytes[(static_cast<size_t>(y) * width + x) * 3 + c] = clipped(sum);
                }
    }
    if (height == in.height) return wide;
    Image out{height, width, std::vector<uint8_t>(static_cast<size_t>(height) * width * 3)};
    const auto taps = taps_of(in.height, height, filter);
    const size_t row = static_cast<size_t>(width) * 3;
    for (int y = 0; y < height; ++y)
        for (size_t at = 0; at < row; ++at) {
            int sum = 1 << (kBits - 1);
            for (size_t i = 0; i < taps[y].weights.size(); ++i)
                sum += wide.bytes[(taps[y].first + i) * row + at] * taps[y].weights[i];
            out.bytes[y * row + at] = clipped(sum);
        }
    return out;
}

}  // namespace detail

// The pixels that the network sees: RGB of the variant's resolution.
inline Image pixels(const Image& image, const Preprocessing& how) {
    int tall = static_cast<int>(std::floor(how.height / how.crop_pct));
    int wide = static_cast<int>(std::floor(how.width / how.crop_pct));
    if (!how.squash && tall == wide) {
        const int shorter = std::min(image.height, image.width), longer = std::max(image.height, image.width);
        const int other = static_cast<int>(static_cast<double>(static_cast<int64_t>(tall) * longer) / shorter);
        (image.height > image.width ? tall : wide) = other;
    } else if (!how.squash) {
        const double ratio = std::min(static_cast<double>(image.height) / tall, static_cast<double>(image.width) / wide);
        tall = std::max(1, static_cast<int>(std::nearbyint(image.height / ratio)));
        wide = std::max(1, static_cast<int>(std::nearbyint(image.width / ratio)));
    }
    if (tall < how.height || wide < how.width) throw std::invalid_argument("crop_pct above 1 pads: not in this example");
    detail::Filter filter = detail::filter_of(how.interpolation);
    filter.antialias = how.antialias || how.interpolation != "bilinear";
    const Image whole = detail::resized(image, tall, wide, filter);
    const int top = static_cast<int>(std::nearbyint((tall - how.height) / 2.0));
    const int left = static_cast<int>(std::nearbyint((wide - how.width) / 2.0));
    Image out{how.height, how.width, {}};
    for (int y = 0; y < how.height; ++y) {
        const auto from = whole.bytes.begin() + (static_cast<size_t>(top + y) * wide + left) * 3;
        out.bytes.insert(out.bytes.end(), from, from + static_cast<size_t>(how.width) * 3);
    }
    return out;
}

// The network's input, (3, H, W): (pixel / 255 - mean) / std in this order, in float.
inline std::vector<float> normalised(const Image& image, const Preprocessing& how) {
    const size_t plane = static_cast<size_t>(image.height) * image.width;
    std::vector<float> out(3 * plane);
    for (int c = 0; c < 3; ++c)
        for (size_t i = 0; i < plane; ++i) out[c * plane + i] = (image.bytes[3 * i + c] / 255.0f - how.mean[c]) / how.std[c];
    return out;
}

}  // namespace rdeploy
