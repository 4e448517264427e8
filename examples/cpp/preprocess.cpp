// Reads a binary PPM (P6) on stdin and writes the network's input, float32 (3, H, W), on stdout.
//   preprocess HEIGHT WIDTH INTERPOLATION CROP_PCT MEAN_R MEAN_G MEAN_B STD_R STD_G STD_B [sharp] < photo.ppm > input.bin
// `sharp` is for a manifest with `"antialias": false`.
// `trtexec --loadInputs=input:input.bin` feeds that file to an engine.
#include "preprocess.hpp"

#include <cstdlib>
#include <iostream>

int main(int count, char** words) {
    const bool sharp = count == 12 && std::string(words[11]) == "sharp";
    if (count != 11 && !sharp) {
        std::cerr << "usage: preprocess HEIGHT WIDTH INTERPOLATION CROP_PCT MEAN*3 STD*3 [sharp] < photo.ppm > input.bin\n";
        return 2;
    }
    rdeploy::Preprocessing how{};
    how.height = std::atoi(words[1]);
    how.width = std::atoi(words[2]);
    how.interpolation = words[3];
    how.crop_pct = std::atof(words[4]);
    how.antialias = !sharp;
    for (int c = 0; c < 3; ++c) {
        how.mean[c] = static_cast<float>(std::atof(words[5 + c]));
        how.std[c] = static_cast<float>(std::atof(words[8 + c]));
    }
    std::string magic;
    rdeploy::Image image;
    int largest = 0;
    std::cin >> magic >> image.width >> image.height >> largest;
    std::cin.get();
    if (magic != "P6" || largest != 255) {
        std::cerr << "not a binary PPM of 8 bits\n";
        return 2;
    }
    image.bytes.resize(static_cast<size_t>(image.height) * image.width * 3);
    std::cin.read(reinterpret_cast<char*>(image.bytes.data()), static_cast<std::streamsize>(image.bytes.size()));
    const auto input = rdeploy::normalised(rdeploy::pixels(image, how), how);
    std::cout.write(reinterpret_cast<const char*>(input.data()), static_cast<std::streamsize>(input.size() * sizeof(float)));
    return std::cin && std::cout ? 0 : 1;
}
